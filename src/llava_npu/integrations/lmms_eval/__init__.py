"""lmms-eval's tasks on this project's models, on any device.

lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval) finds models by the entry point `lmms_eval.models`, which this
package declares. With both installed:

    python -m lmms_eval --model llava_npu --model_args pretrained=runs/finetune --tasks mmbench_en_dev --batch_size 16

`manifest.py` is what the entry point names, `model.py` what it leads to.
"""
