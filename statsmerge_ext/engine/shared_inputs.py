"""Sums over what linear layers read, taken once for all that read the same: queries, keys and values, for instance."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.moments import Moments
from statsmerge_ext.evidence.observe import Observation

# By how much sums over inputs may be dearer than sums over outputs: other layers that read the inputs need no more.
_FOR_OTHERS = 1.5

#: What an expert's pass and the merged model's see at a layer.
Pair = tuple[Observation | None, Observation]


class SharedInputs:
    """The inputs x of one expert's passes at a linear layer, and those of the merged model, x̃, as long as they last.

    What the expert makes of x need not be formed: Σ W x x̃ᵀ = W Σ x x̃ᵀ.
    """

    def __init__(self) -> None:
        self._of: list[list[tuple | None]] = []
        self._sums: Moments | None = None

    def are_worth_summing(self, pairs: Sequence[Pair], matrices: Tensor) -> bool:
        """Whether :meth:`moments` takes less for a layer with weights ``matrices`` [1, out, in], and others that may
        read the same, than forming its outputs. Several processes ask alike, and are told the same."""
        out, columns = matrices.shape[1:]
        known = self._sums is not None and len(pairs) == len(self._of) and all(map(_is_same, self._of, pairs))
        everywhere = processes.of_all((known, sum(now.input.numel() for _, now in pairs) / columns))
        if not all(known for known, _ in everywhere):
            self._sums = None
        rows = sum(rows for _, rows in everywhere)
        return self._sums is not None or columns * (rows + out) <= _FOR_OTHERS * 2 * rows * out

    def moments(
        self,
        pairs: Sequence[Pair],
        rows: Iterable[tuple[Tensor, Tensor, Tensor | None]],
        matrices: Tensor,
        shift: Tensor | None,
    ) -> Moments:
        """Moments of x̃ with targets W x + b, of all processes.

        Args:
            pairs: as :meth:`are_worth_summing` has just been asked for.
            rows: x̃ [..., in], x [..., in] and factors of the rows [...], or None, batch by batch; not taken if known.
            matrices, shift: W [1, out, in] and b [out], or None.

        Raises ProcessError if another process has ended.
        """
        if self._sums is None:
            columns = matrices.shape[-1]
            sums = Moments.zeros_like(matrices.new_empty(1, columns, columns))
            for now, own, weight in rows:
                sums.add_rows(now, own, weight)
            sums.add_up_()
            ops.symmetrize_(sums.gram)
            self._of, self._sums = [[_identity(seen) for seen in pair] for pair in pairs], sums
        return self._sums.followed_by(matrices, shift)


def _identity(seen: Observation | None) -> tuple | None:
    return seen and (weakref.ref(seen.input), seen.input._version, seen.view)


def _is_same(known: list[tuple | None], pair: Pair) -> bool:
    """Whether observations have what those had whose identities are ``known``."""
    for before, seen in zip(known, pair, strict=True):
        if before is None or seen is None:
            if before is not seen:
                return False
        elif before[0]() is not seen.input or before[1:] != (seen.input._version, seen.view):
            return False
    return True
