"""The distributions of a block of states over the vocabulary, in the type of the states.

Dimensions: n tokens of a block, d width, V vocabulary, P peaks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.products import product, product_back

CACHED = 1 << 22
"""Bytes of logits that are read at once on a CPU: pass after pass finds them in its cache."""

PEAKS = 128
"""Stretches of the vocabulary, about, of which the greatest is looked at in float32."""


@dataclass
class Block:
    """The distributions p of a block of states: n tokens."""

    logits: Tensor  # (n, V) in the type of the states
    p: Tensor  # (n, V) in the same
    top: Tensor  # (n,) float32, the greatest logit
    place: Tensor  # (n,) the peak that it is
    total: Tensor  # (n,) float32, the sum of p as it is rounded
    log_top: Tensor  # (n,) float32, log of the greatest p

    @classmethod
    def of(cls, states: Tensor, weight: Tensor) -> "Block":
        """softmax(W h), kept in the type of the states: in bfloat16 a float32 copy of the logits
        and what is made of it would take twice as long as the product itself.

        A p is then known to three digits. Their sums are better known, for the errors of many
        cancel: with Z = Σ_v exp(l_v - top), the peaks' sum of exp(l_v - top) is Z times that of
        their p, and the latter is 1 less what the others add up to where most of p is in peaks.
        """
        logits = product(states, weight)
        p = torch.empty_like(logits)
        total, top, log_top = torch.empty(3, len(logits), device=logits.device)
        place = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for rows in in_cache(logits):
            torch.softmax(logits[rows], -1, out=p[rows])
            total[rows] = p[rows].sum(-1, dtype=torch.float32)
            peaks = _peaks(logits[rows]).float()  # (n, P)
            top[rows], place[rows] = peaks.max(-1)
            odds = (peaks - top[rows, None]).exp_().scatter_(1, place[rows, None], 0).sum(-1)
            share = _peaks(p[rows]).sum(-1, dtype=torch.float32)
            most = torch.log1p((share - total[rows]).clamp(min=-0.5, max=0))
            log_top[rows] = torch.where(share > 0.5, most, share.log()) - odds.log1p()
        return cls(logits, p, top, place, total, log_top)

    def logps(self, targets: Tensor) -> Tensor:
        """log p of the targets: (n,) float32."""
        chosen = self.logits.gather(1, targets[:, None]).squeeze(1)
        return chosen.float() - self.top + self.log_top

    def mean_row(self, weight: Tensor) -> Tensor:
        """W̄ = Σ_v p_v W_v in float32, p as it is rounded: (n, d). A p above 1/2 is overwritten.

        The product rounds to the type of the states, a sum near W_top by as much as that is long;
        so p_top is left to float32 where it is the most, and the product is that of
        Σ_v p_v (W_v - W_top).
        """
        tops = self._tops()
        chosen = self.p.gather(1, tops[:, None]).squeeze(1)
        others = (chosen.float() - self.total).to(self.p.dtype)
        put = torch.where(chosen > 0.5, others, chosen)
        self.p[torch.arange(len(tops), device=tops.device), tops] = put
        found = product_back(self.p, weight).float()
        found.addcmul_(weight[tops].float(), (chosen.float() - put.float())[:, None])
        return found.div_(self.total[:, None])

    def entropy(self) -> Tensor:
        """H = -Σ p log p: (n,) float32. The logits are overwritten."""
        found, top = -self.log_top, self.top.to(self.logits.dtype)  # exact: it is one of them
        for rows in in_cache(self.logits):
            below = self.logits[rows].sub_(top[rows, None])
            found[rows] -= below.mul_(self.p[rows]).sum(-1, dtype=torch.float32) / self.total[rows]
        return found

    def residual(self, targets: Tensor) -> Tensor:
        """p - 1_y in place of p: (n, V)."""
        chosen = self.p.gather(1, targets[:, None])
        others = (self.total[:, None] - chosen.float()).to(self.p.dtype)
        self.p[torch.arange(len(targets), device=targets.device), targets] = -others.squeeze(1)
        return self.p  # scatter_ would copy all of it twice

    def _tops(self) -> Tensor:
        """The id of the greatest logit: (n,)."""
        count = self.logits.shape[1]
        size = max(1, count // PEAKS)
        whole = count // size
        start = torch.where(self.place < whole, self.place * size, self.place + whole * (size - 1))
        ids = start[:, None] + torch.arange(size, device=start.device)
        ids.clamp_(max=count - 1)
        inside = self.logits.gather(1, ids).argmax(-1, keepdim=True)
        return ids.gather(1, inside).squeeze(1)


def in_cache(block: Tensor) -> list[slice]:
    """The rows of a block of logits (n, V), as many at once as a CPU keeps in its cache."""
    count, size = block.shape[0], block.shape[1] * block.element_size()
    step = max(1, CACHED // size) if block.device.type == "cpu" else max(1, count)
    return [slice(start, start + step) for start in range(0, count, step)]


def _peaks(rows: Tensor) -> Tensor:
    """The greatest of each stretch of the vocabulary, and what is left behind the last: (n, P)."""
    size = max(1, rows.shape[1] // PEAKS)
    whole = rows.shape[1] // size * size
    return torch.cat([rows[:, :whole].unflatten(1, (-1, size)).amax(-1), rows[:, whole:]], 1)
