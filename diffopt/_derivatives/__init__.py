"""Second derivatives that PyTorch lacks, has wrong, or takes long for."""
