"""Names of the formats in which a cache holds keys and values: the core's table. Byte layouts: csrc/kv/format_*.h. No torch."""

from typing import NamedTuple

from .. import _C
from .reading import shown

FORMATS = tuple(_C.formats())


class KvFormat(NamedTuple):
    """Format of the keys and of the values of a layer: "none" (the model's dtype), "fp8", "int8" or "int4"."""

    k: str
    v: str

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"{self.k}/{self.v}"


PLAIN = KvFormat("none", "none")


def parse_kv_format(name: str, value) -> KvFormat:
    """What a caller may write: None, one format for keys and values, "keys/values" as in "int8/int4", or {"k": ..., "v": ...}.

    Raises TypeError or ValueError naming the argument `name` and what is supported.
    """
    if value is None:
        return PLAIN
    if isinstance(value, str):
        keys, slash, values = value.partition("/")
        value = {"k": keys, "v": values if slash else keys}
    elif isinstance(value, KvFormat):
        value = value._asdict()
    if not isinstance(value, dict) or value.keys() != {"k", "v"}:
        supported = f'None, one of {", ".join(FORMATS)}, two of them as "keys/values", or {{"k": format, "v": format}}'
        raise TypeError(f"{name} must be {supported}; got {shown(value)}")
    for given in value.values():
        if given not in FORMATS:
            raise ValueError(f"{name} {shown(given)} is not supported; supported: {', '.join(FORMATS)}")
    return KvFormat(**value)
