"""What lets torch.compile, torch.export, TorchScript, quantization and others use the modules."""
