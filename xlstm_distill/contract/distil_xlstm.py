"""The shape of a Distil-xLSTM in numbers: parameters and products of its blocks, from the teacher's shape (pure).

H: width, I: inner width of the mLSTM, F: of the sLSTM's MLP, N: heads, D = H / N, K: positions of a convolution. The
numbers behind them are those of `model.distil_xlstm.DistilXLSTMConfig`, the `xlstm` package's.
"""

from dataclasses import dataclass

HEADS = 4
CONVOLUTION = 4
QKV_BLOCK = 4
MLSTM_FACTOR = 2.0
MLP_FACTOR = 1.3


@dataclass(frozen=True)
class Blocks:
    """The blocks under a teacher of this width and number of layers."""

    width: int
    """H."""
    layers: int
    """Of the teacher."""

    @property
    def slstm(self) -> int:
        """sLSTM blocks: the first, and every other one."""
        return -(-self.count // 2)

    @property
    def mlstm(self) -> int:
        """mLSTM blocks."""
        return self.count // 2

    @property
    def count(self) -> int:
        """Half the teacher's layers, at least one."""
        return max(1, self.layers // 2)

    @property
    def inner(self) -> int:
        """I."""
        return _rounded(MLSTM_FACTOR * self.width)

    @property
    def mlp(self) -> int:
        """F."""
        return _rounded(MLP_FACTOR * self.width)

    @property
    def parameters(self) -> int:
        """Of all blocks and the norm behind them: what trains."""
        h, i, dim = self.width, self.inner, self.width // HEADS
        # Gates and recurrence, biases, convolution, norms before, behind the cell and before the MLP; MLP.
        slstm = 8 * h * dim + 4 * h + (CONVOLUTION + 1) * h + 3 * h + 3 * h * self.mlp
        # Up and down, q, k, v, gates, convolution, skip, norms behind and before.
        mlstm = 3 * h * i + 3 * i * QKV_BLOCK + 2 * HEADS * (3 * i + 1) + (CONVOLUTION + 1) * i + 2 * i + h
        return self.slstm * slstm + self.mlstm * mlstm + h

    def flops(self, sequence: int) -> float:
        """Products of matrices in the forward pass, per token of T: two operations per multiplication; convolutions,
        which are no such products, are not counted."""
        h, i, dim = self.width, self.inner, self.width // HEADS
        slstm = 2.0 * (8 * h * dim + 3 * h * self.mlp)
        pairs = (sequence + 1) / 2  # of positions that see each other, per token
        mlstm = 2.0 * (3 * h * i + 3 * i * QKV_BLOCK + 6 * i * HEADS + 2 * i * pairs)
        return self.slstm * slstm + self.mlstm * mlstm


def _rounded(width: float) -> int:
    """Up to a multiple of 64."""
    return 64 * -(-int(width) // 64)
