"""What Arrow's files say of themselves, read before pyarrow does."""

import pathlib
import struct

import pyarrow as pa

from attnpo_jax.runtime.errors import UserError

# Fields of the flatbuffers `Message` and `RecordBatch`, by place, and the kind of a message.
# https://arrow.apache.org/docs/format/Columnar.html#format-ipc
_HEADER_TYPE, _HEADER, _COMPRESSION = 1, 2, 3
_DICTIONARY_BATCH = 2


def refuse_packed(file: pathlib.Path, source: str) -> None:
    """Refuses an Arrow stream whose batches are compressed: they would be unpacked whole.

    Raises:
      UserError: they are; it says what would be accepted.
      pa.ArrowInvalid: it is no Arrow stream.
    """
    with pa.memory_map(str(file)) as content:
        while True:
            try:
                message = pa.ipc.read_message(content)
            except EOFError:
                return
            if message.type in ("record batch", "dictionary"):
                try:
                    packed = _is_packed(message.metadata.to_pybytes())
                except (struct.error, IndexError) as error:
                    raise pa.ArrowInvalid(f"a damaged header: {error}") from error
                if packed:
                    raise UserError(
                        f"{source}: {file.name} holds compressed batches; accepted: an Arrow "
                        "stream without compression, or Parquet"
                    )


def _is_packed(metadata: bytes) -> bool:
    def field(table: int, number: int) -> int | None:
        """Where a field of a table is; None where it has its default."""
        of_fields = table - struct.unpack_from("<i", metadata, table)[0]
        size = struct.unpack_from("<H", metadata, of_fields)[0]
        if 4 + 2 * number >= size:
            return None
        offset = struct.unpack_from("<H", metadata, of_fields + 4 + 2 * number)[0]
        return table + offset if offset else None

    def follow(place: int) -> int:
        return place + struct.unpack_from("<I", metadata, place)[0]

    message = follow(0)
    header = field(message, _HEADER)
    if header is None:
        return False
    batch = follow(header)
    kind = field(message, _HEADER_TYPE)
    if kind is not None and metadata[kind] == _DICTIONARY_BATCH:
        data = field(batch, 1)  # of a dictionary's batch, the record batch in it
        if data is None:
            return False
        batch = follow(data)
    return field(batch, _COMPRESSION) is not None
