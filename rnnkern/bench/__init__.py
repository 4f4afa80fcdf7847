"""``rnnkern compare``: checks rnnkern against torch.nn and times both."""
