"""One decoder for the Llama and Qwen-3 families, its masks, heads and losses, and Hugging Face weights in and out."""
