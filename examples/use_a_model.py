"""Using a trained model from Python, cell by cell: run it whole, or in an editor that knows `# %%`.

python examples/use_a_model.py MODEL_FOLDER PICTURE
"""

# %% A model folder: `runs/finetune/model` of a training run, or any LLaVA checkpoint in Hugging Face's layout.
import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import llava_npu

folder, picture_file = sys.argv[1:3]
picture = Image.open(picture_file).convert("RGB")
question = "What is in the picture?"

# %% As transformers' users know it: after `import llava_npu`, its pipeline and Auto classes open our models, whatever
# their projector. The processor builds the prompt of training.
messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
ask = pipeline("image-text-to-text", model=folder, device="cpu")
reply = ask(text=messages, max_new_tokens=16, generate_kwargs={"do_sample": False}, return_full_text=False)
print("pipeline:      ", repr(reply[0]["generated_text"]))

# %%
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print("Auto classes:  ", repr(answer))

# %% The shorter way, on any device: `load` checks the folder, `answer_all` answers many questions, several at a time.
loaded = llava_npu.load(folder, "cpu")  # a model and its processor
greedy = llava_npu.Sampling(max_new_tokens=16)
texts = llava_npu.answer_all(
    loaded,
    [question, "Is <image> the same as <image>?", "And without a picture?"],
    [[picture_file], [picture, picture], []],
    sampling=greedy,
)
print("answer_all:    ", texts)

# %% A conversation, word by word.
from llava_npu.inference.engine import InferenceEngine  # noqa: E402
from llava_npu.serving.terminal import Conversation  # noqa: E402

conversation = Conversation(InferenceEngine(loaded, max_batch=1), greedy)
conversation.attach(picture)
for text in (question, "Are you sure?"):
    print("conversation:  ", repr("".join(conversation.ask(text))))
