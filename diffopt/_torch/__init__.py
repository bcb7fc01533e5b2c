"""The only home of private PyTorch names."""
