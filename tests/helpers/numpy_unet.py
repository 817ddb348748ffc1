"""The blocks of DDPM's U-Net in plain NumPy, float64, for `nets/blocks.py`.

Written from the description of the official network, pixel by pixel: padding, strides,
groups and copies are index arithmetic here, not options of a library. Every function
takes the parameters of one Flax module as a dict.
"""

import numpy as np


def swish(x):
    return x / (1.0 + np.exp(-x))


def time_embedding(t, channels):
    """sin of all phases, then cos of all phases; frequencies 1 down to 1e-4."""
    half = channels // 2
    out = np.zeros([len(t), channels])  # An odd count leaves its last column zero.
    for k in range(half):
        frequency = np.exp(-k * np.log(10000.0) / (half - 1))
        for i in range(len(t)):
            out[i, k] = np.sin(float(t[i]) * frequency)
            out[i, half + k] = np.cos(float(t[i]) * frequency)
    return out


def dense(p, x):
    return np.einsum("...c,cd->...d", x, p["kernel"]) + p["bias"]


def conv3x3(p, x):
    """Stride 1: one pixel of zeros on every side."""
    return correlate(p, x, stride=1, before=1, after=1)


def downsample(p, x):
    """Stride 2: zeros below and to the right only."""
    return correlate(p["conv"], x, stride=2, before=0, after=1)


def correlate(p, x, *, stride, before, after):
    batch, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    rows, cols = height // stride, width // stride
    out = np.zeros([batch, rows, cols, p["kernel"].shape[-1]])
    for i in range(rows):
        for j in range(cols):
            top, left = i * stride, j * stride
            window = padded[:, top : top + 3, left : left + 3, :]
            out[:, i, j] = np.einsum("brsc,rscd->bd", window, p["kernel"]) + p["bias"]
    return out


def upsample(p, x):
    batch, height, width, channels = x.shape
    out = np.zeros([batch, 2 * height, 2 * width, channels])
    for i in range(2 * height):
        for j in range(2 * width):
            out[:, i, j] = x[:, i // 2, j // 2]
    return conv3x3(p["conv"], out)


def group_norm(p, x, groups, epsilon=1e-6):
    size = x.shape[-1] // groups
    out = np.zeros(x.shape)
    for b in range(x.shape[0]):
        for g in range(groups):
            members = slice(g * size, (g + 1) * size)
            values = x[b, :, :, members]
            mean = values.sum() / values.size
            variance = ((values - mean) ** 2).sum() / values.size
            out[b, :, :, members] = (values - mean) / np.sqrt(variance + epsilon)
    return out * p["scale"] + p["bias"]


def res_block(p, x, time, groups):
    h = conv3x3(p["conv1"], swish(group_norm(p["norm1"], x, groups)))
    shift = dense(p["time"], swish(time))
    for b in range(len(h)):
        h[b] += shift[b]
    h = conv3x3(p["conv2"], swish(group_norm(p["norm2"], h, groups)))
    if "shortcut" in p:
        x = dense(p["shortcut"], x)
    return x + h


def attention(p, x, groups):
    batch, height, width, channels = x.shape
    h = group_norm(p["norm"], x, groups)
    q, k, v = (dense(p[name], h) for name in ("query", "key", "value"))
    out = np.zeros(x.shape)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                scores = np.einsum("c,rsc->rs", q[b, i, j], k[b]) / np.sqrt(channels)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, i, j] = np.einsum("rs,rsc->c", weights, v[b])
    return x + dense(p["out"], out)


def unet(p, x, t, label=None, *, channels, levels, blocks, attention_at, groups):
    """The whole network, without dropout.

    Args:
      p: parameters, float64.
      x: images [B, H, W, C].
      t: times [B].
      label: classes [B], or None.
      channels: width of the first level.
      levels: number of levels.
      blocks: residual blocks a level on the way down.
      attention_at: pixels of the shorter side with attention.
      groups: groups of every normalisation.
    """
    time = swish(dense(p["time1"], time_embedding(t, channels)))
    time = dense(p["time2"], time)
    if label is not None:
        time = time + np.stack([p["label"]["embedding"][n] for n in label])

    def level(h, name):
        h = res_block(p[name], h, time, groups)
        if min(h.shape[1:3]) in attention_at:
            h = attention(p[f"{name}_attention"], h, groups)
        return h

    h = conv3x3(p["conv_in"], x)
    saved = [h]
    for i in range(levels):
        for j in range(blocks):
            h = level(h, f"down{i}_block{j}")
            saved.append(h)
        if i != levels - 1:
            h = downsample(p[f"down{i}_downsample"], h)
            saved.append(h)

    h = res_block(p["middle_block0"], h, time, groups)
    h = attention(p["middle_attention"], h, groups)
    h = res_block(p["middle_block1"], h, time, groups)

    for i in range(levels - 1, -1, -1):
        for j in range(blocks + 1):
            h = level(np.concatenate([h, saved.pop()], axis=3), f"up{i}_block{j}")
        if i != 0:
            h = upsample(p[f"up{i}_upsample"], h)
    assert not saved
    return conv3x3(p["conv_out"], swish(group_norm(p["norm_out"], h, groups)))
