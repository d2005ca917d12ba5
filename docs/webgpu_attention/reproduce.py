"""MultiHeadAttention of ONNX Runtime's WebGPU provider is wrong on Vulkan from 32 tokens on: a reproduction.

    pip install numpy onnxruntime==1.32.0 onnxruntime-ep-webgpu==0.4.0
    python reproduce.py              # on a Linux machine with an AMD or Intel GPU

Without a GPU, on Mesa's software Vulkan driver (25.0; it compiles the kernel for minutes):

    ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1 VK_DRIVER_FILES=/usr/share/vulkan/icd.d/lvp_icd.json python reproduce.py

Prints, for several lengths, how far the provider's output is from attention in float64, and from two versions of flash
attention in numpy: one with the scores of each tile of keys computed from zero, one in which they are added to those of
the tile before. Ends with status 1 where the provider is wrong.
"""

import sys

import numpy as np
import onnxruntime
import onnxruntime_ep_webgpu

HEADS, HEAD_SIZE = 2, 64
TILE = 8  # keys at a time; 16 where subgroups are wider


def varint(value):
    """An integer in the encoding of protocol buffers."""
    data = []
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def field(number, value):
    """A field of a message: an integer, or a text or message with its length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def model(heads):
    """An ONNX model of one node, y = com.microsoft.MultiHeadAttention(q, k, v), as bytes."""

    def value(name):  # a ValueInfoProto: float32 [batch, tokens, width], all free
        shape = b"".join(field(1, field(2, dimension)) for dimension in ("batch", "tokens", "width"))
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))

    attribute = field(1, "num_heads") + field(3, heads) + field(20, 2)
    inputs = b"".join(field(1, name) for name in "qkv")
    node = inputs + field(2, "y") + field(4, "MultiHeadAttention") + field(5, attribute) + field(7, "com.microsoft")
    graph = field(1, node) + field(2, "graph") + b"".join(field(11, value(name)) for name in "qkv")
    imports = field(8, field(1, "") + field(2, 20)) + field(8, field(1, "com.microsoft") + field(2, 1))
    return field(1, 10) + field(7, graph + field(12, value("y"))) + imports


def split(x):
    """[1, tokens, width] as [heads, tokens, head size], in float64."""
    return x[0].astype(np.float64).reshape(x.shape[1], HEADS, HEAD_SIZE).transpose(1, 0, 2)


def joined(x):
    """[heads, tokens, head size] as [1, tokens, width]."""
    return x.transpose(1, 0, 2).reshape(1, x.shape[1], -1)


def attention(q, k, v):
    """Attention as it is defined."""
    scores = split(q) @ split(k).transpose(0, 2, 1) / np.sqrt(HEAD_SIZE)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return joined(weights / weights.sum(-1, keepdims=True) @ split(v))


def flash(q, k, v, stale):
    """Attention over tiles of keys. If `stale`, each tile's scores are added to what the last one left behind."""
    q, k, v = split(q) / np.sqrt(HEAD_SIZE), split(k), split(v)
    most, total, mixed = np.full((*q.shape[:2], 1), -1e30), np.zeros((*q.shape[:2], 1)), np.zeros_like(q)
    scores = 0
    for start in range(0, k.shape[1], TILE):
        scores = (scores if stale else 0) + q @ k[:, start : start + TILE].transpose(0, 2, 1)
        highest = np.maximum(most, scores.max(-1, keepdims=True))
        scores = np.exp(scores - highest)
        kept = total * np.exp(most - highest)
        most, total = highest, kept + scores.sum(-1, keepdims=True)
        scores = scores / total
        mixed = mixed * (kept / total) + scores @ v[:, start : start + TILE]
    return joined(mixed)


def distance(found, expected):
    """The norm of the difference over the norm."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def main():
    """Asks for several lengths."""
    onnxruntime.register_execution_provider_library("webgpu", onnxruntime_ep_webgpu.get_library_path())
    name = onnxruntime_ep_webgpu.get_ep_name()
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name][:1]
    if not devices:
        sys.exit("the provider finds no GPU")
    options = onnxruntime.SessionOptions()
    options.add_provider_for_devices(devices, {})
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = onnxruntime.InferenceSession(model(HEADS), options)
    print("relative distance of the provider's output")
    print("tokens  to attention  to flash attention  to flash attention with stale scores")
    worst = 0.0
    for tokens in (16, 32, 64, 256):
        random = np.random.default_rng(tokens)
        q, k, v = (random.standard_normal((1, tokens, HEADS * HEAD_SIZE), dtype=np.float32) for _ in range(3))
        (found,) = session.run(None, {"q": q, "k": k, "v": v})
        to_true = distance(found, attention(q, k, v))
        to_flash, to_stale = (distance(found, flash(q, k, v, stale)) for stale in (False, True))
        print(f"{tokens:6}  {to_true:12.1e}  {to_flash:18.1e}  {to_stale:37.1e}", flush=True)
        worst = max(worst, to_true)
    print("wrong" if worst > 1e-4 else "right")
    sys.exit(int(worst > 1e-4))


if __name__ == "__main__":
    main()
