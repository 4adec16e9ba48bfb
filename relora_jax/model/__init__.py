"""The LLaMA decoder: rotary positions, attention, the loss, sampling."""
