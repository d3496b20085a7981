"""Pace: how many tokens of a prompt may be read before the decoding rows wait too long."""

MIN_CHUNK = 128  # tokens; fewer read the weights too often, and key smoothing takes its mean of so many
MAX_CHUNK = 8192  # tokens; more fill no GPU better and need memory for activations
_STEP = 64  # chunks are a multiple of it: kernels and allocators meet few shapes
_FORGET = 0.9  # the weight of a measurement after one more


class Pace:
    """Milliseconds of a chunk of n tokens behind c earlier ones, as n * (a + b * (c + n / 2)), a and b >= 0 fitted to what was
    measured: matrix products cost the same for each token, attention grows with what it sees.
    """

    def __init__(self, limit_ms: float):
        self.limit_ms = limit_ms
        self.largest = 0  # tokens of the largest chunk measured: the next is at most twice as large
        self._sums = [0.0] * 5  # of x x, x y, y y, x t, y t, where x = n and y = n * (c + n / 2)

    def note(self, tokens: int, before: int, ms: float) -> None:
        x, y = float(tokens), tokens * (before + tokens / 2)
        terms = x * x, x * y, y * y, x * ms, y * ms
        self._sums = [_FORGET * total + term for total, term in zip(self._sums, terms, strict=True)]
        self.largest = max(self.largest, tokens)

    def predict(self, tokens: int, before: int) -> float:
        """Milliseconds; 0 before anything was measured."""
        a, b = self._fit()
        return tokens * (a + b * (before + tokens / 2))

    def chunk(self, left: int, before: int) -> int:
        """Tokens of a prompt, of which `left` are to be read behind `before`, that take `limit_ms` at most.

        MIN_CHUNK tokens, or all that are left, whatever they take: a prompt has to come to its end.
        """
        most = min(MAX_CHUNK, max(MIN_CHUNK, 2 * self.largest))
        while most > MIN_CHUNK and self.predict(most, before) > self.limit_ms:
            most = max(MIN_CHUNK, most - max(_STEP, most // 8 // _STEP * _STEP))
        return min(left, most)

    def _fit(self) -> tuple[float, float]:
        xx, xy, yy, xt, yt = self._sums
        if not xx:
            return 0.0, 0.0
        determinant = xx * yy - xy * xy
        if determinant > 1e-6 * xx * yy:
            a, b = (yy * xt - xy * yt) / determinant, (xx * yt - xy * xt) / determinant
            if a >= 0 and b >= 0:
                return a, b
            if a < 0:
                return 0.0, yt / yy
        return xt / xx, 0.0
