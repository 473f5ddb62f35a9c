"""Where models come from: Hugging Face, ModelScope, local folders."""
