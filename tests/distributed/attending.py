"""Run by several processes: attention over shared rows and over whole ones, with gradients, in float64."""

from __future__ import annotations

import itertools
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from axolotl.model.attention import packed_attention
from axolotl.model.context import SharedRows, share_rows

CASES = {
    # heads, key/value heads, window, cap, sinks, borders
    "plain": (8, 8, None, None, False, None),
    "grouped": (8, 2, None, None, False, None),
    "one key head": (8, 1, None, None, False, [0, 5, 48]),
    "documents": (8, 4, None, None, False, [0, 3, 4, 30, 48]),
    "window": (8, 4, 5, None, False, [0, 20, 48]),
    "capped": (8, 4, None, 2.0, False, [0, 31, 48]),
    "sinks": (8, 2, 7, None, True, [0, 10, 48]),
}
T, D = 48, 6


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    part = slice(rank * T // size, (rank + 1) * T // size)
    for name, (heads, grouped, window, cap, sunk, borders) in CASES.items():
        torch.manual_seed(0)
        whole = [torch.randn(1, n, T, D, dtype=torch.float64) for n in (heads, grouped, grouped)]
        sinks = torch.randn(heads, dtype=torch.float64) if sunk else None
        toward = torch.randn(1, T, heads, D, dtype=torch.float64)
        more = {"sliding_window": window, "softcap": cap}
        if borders:
            more["cu_seq_lens_q"] = torch.tensor(borders, dtype=torch.int32)
            more["max_length_q"] = max(b - a for a, b in itertools.pairwise(borders))
        results = []
        for shared in (None, SharedRows(dist.group.WORLD, bool(borders))):
            share_rows(shared)
            cut = slice(None) if shared is None else part
            given = [x[:, :, cut].clone().requires_grad_() for x in whole]
            s = None if sinks is None else sinks.clone().requires_grad_()
            out, _ = packed_attention(nn.Identity(), *given, is_causal=True, s_aux=s, **more)
            # A gradient that does not lie in one piece.
            out.transpose(1, 2).backward(toward[:, cut].transpose(1, 2))
            grads = [x.grad for x in given]
            if s is not None:
                if shared is not None:
                    dist.all_reduce(s.grad)
                grads.append(s.grad)
            results.append([out.detach(), *grads])
        alone, together = results
        expected = [alone[0][:, part], *(g[:, :, part] for g in alone[1:4]), *alone[4:]]
        for a, b in zip(expected, together, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        print(name, "agrees", flush=True)
    # A thread of gloo that is in C++ when Python ends would abort.
    sys.stdout.flush()
    os._exit(0)


main()
