"""The deterministic encodings on torch tensors of any device: the same bytes as the compiled members make.

A worker on a GPU encodes before the copy to the host and decodes deltas after the copy to the device. This
folder alone may import torch, and nothing else in paramserver imports this folder.
"""

from paramserver.encoding.on_torch.codec import decode, decode_add_, encode

__all__ = ["decode", "decode_add_", "encode"]
