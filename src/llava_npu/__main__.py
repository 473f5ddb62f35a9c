"""`python -m llava_npu` is `llava-npu`; launchers such as torchrun start it so."""

from llava_npu.cli import main

if __name__ == "__main__":
    main()
