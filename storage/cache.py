"""A cache directory: manifest, shards with their receipts, tail prior, tokenizer, card.

Order of events, which is what makes a kill at any moment harmless:

1. the folder gets `manifest.json`: from here on it belongs to one identity; then its tokenizer copy;
2. a shard appears, then its summed tail, then its receipt; a shard without a receipt is written again;
3. when every receipt is there, `tail_prior.parquet` and at last `README.md` (the card) seal the cache.

Shards are a fixed function of the manifest, so doing one twice, or in two processes at once, is harmless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import shard as shard_file
from storage.errors import CacheError
from storage.files import remove_temporaries, sha256_file, write_bytes
from storage.manifest import Manifest, Receipt, read_manifest, read_receipt, write_model
from storage.rows import Rows

MANIFEST = "manifest.json"
CARD = "README.md"
TOKENIZER = "tokenizer"
TAIL_PRIOR = "tail_prior.parquet"
SHARDS = "shards"
# Each shard's summed tail; kept beside the shards so that a lost shard can be made again.
TAIL_SUMS = "tail_sums"


def sums(rows: Rows) -> tuple[float, float]:
    """Tail mass and UNC summed over the stored positions, as a receipt says them."""
    mask = rows["loss_mask"].values
    tail = rows["tail_logmass"].values[mask].astype(np.float64)
    gold = rows["gold_logprob"].values[mask].astype(np.float64)
    # Rounding may lift a sure teacher's log-probability above 0.
    return float(np.exp(tail).sum()), max(0.0, float(-np.expm1(gold).sum()))


class Cache:
    """An opened cache directory. `open` for reading, `create_or_resume` for writing."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._cache_id = manifest.cache_id

    @classmethod
    def open(cls, path: str | Path) -> Cache:
        """Raises CacheError where there is no cache, or one this program cannot read."""
        path = Path(path)
        if not path.is_dir():
            raise CacheError(f"{path}: no such directory; --shards wants the --output of `pipeline cache-teacher`")
        return cls(path, read_manifest(path / MANIFEST))

    @classmethod
    def check_target(cls, path: str | Path) -> None:
        """Raises CacheError unless `path` can become a cache: absent, empty, or a cache already."""
        path = Path(path)
        for place in (path, *path.parents):
            if place.exists():
                if not place.is_dir():
                    raise CacheError(f"{place}: is a file; --output wants a directory")
                break
        if path.is_dir() and not (path / MANIFEST).exists():
            strange = [entry.name for entry in path.iterdir() if entry.name[:1] != "."]
            if strange:
                raise CacheError(
                    f"{path}: holds other files ({', '.join(sorted(strange)[:3])}) and no cache; name a new directory"
                )

    @classmethod
    def resume(cls, path: str | Path, manifest: Manifest) -> Cache | None:
        """The cache of this identity that lies at `path`, or None where nothing does; writes nothing.

        Raises CacheError, with the differences named, where another cache lies there.
        """
        path = Path(path)
        cls.check_target(path)
        if not (path / MANIFEST).exists():
            return None
        there = read_manifest(path / MANIFEST)
        if differences := there.differences(manifest):
            raise CacheError(
                f"{path}: holds another cache ({'; '.join(differences[:4])}); "
                "name a new --output or repeat the command that began it"
            )
        return cls(path, there)

    @classmethod
    def create_or_resume(cls, path: str | Path, manifest: Manifest) -> Cache:
        """`resume`, or claim `path` for `manifest`; then make its folders and clear what killed writers left."""
        path = Path(path)
        cache = cls.resume(path, manifest)
        if cache is None:
            path.mkdir(parents=True, exist_ok=True)
            try:
                write_model(path / MANIFEST, manifest, exclusive=True)
            except FileExistsError:
                # Another process was first: with the same manifest, or `resume` refuses.
                cls.resume(path, manifest)
            cache = cls(path, manifest)
        remove_temporaries(path)
        for folder in (SHARDS, TAIL_SUMS):
            (path / folder).mkdir(exist_ok=True)
            remove_temporaries(path / folder)
        return cache

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    def shard_path(self, index: int) -> Path:
        return self.path / SHARDS / f"part-{index:05d}.parquet"

    def receipt_path(self, index: int) -> Path:
        return self.path / SHARDS / f"part-{index:05d}.json"

    def _tail_sum_path(self, index: int) -> Path:
        return self.path / TAIL_SUMS / f"part-{index:05d}.parquet"

    def receipt(self, index: int) -> Receipt:
        """Raises CacheError where it is missing, damaged, or of another shard or cache."""
        path = self.receipt_path(index)
        receipt = read_receipt(path)
        if receipt.cache_id != self._cache_id or receipt.shard != index:
            raise CacheError(
                f"{path}: this receipt belongs to shard {receipt.shard} of cache {receipt.cache_id}, "
                f"not to shard {index} of {self._cache_id}"
            )
        if receipt.rows != self.manifest.shards[index].sequences:
            raise CacheError(f"{path}: {receipt.rows} rows, the plan says {self.manifest.shards[index].sequences}")
        return receipt

    def receipts(self) -> list[Receipt]:
        """Of every shard. Raises CacheError, saying how far the cache is, where some are not done."""
        pending = [index for index in range(len(self.manifest.shards)) if not self.receipt_path(index).exists()]
        if pending:
            raise CacheError(
                f"{self.path}: unfinished, {len(pending)} of {len(self.manifest.shards)} shards are missing "
                f"(first: {self.shard_path(pending[0]).name}); repeat the `pipeline cache-teacher` that began it"
            )
        return [self.receipt(index) for index in range(len(self.manifest.shards))]

    def is_done(self, index: int) -> bool:
        """Whether a shard is there, whole: its receipt is good and the file has its length and checksum."""
        try:
            self.check_file(index)
        except CacheError:
            return False
        return True

    def check_file(self, index: int) -> Receipt:
        """Compare a shard with its receipt, byte for byte. Raises CacheError."""
        try:
            return self._check_file(index)
        except OSError as error:
            raise CacheError(f"{self.shard_path(index)}: cannot be read ({error.strerror or error})") from None

    def _check_file(self, index: int) -> Receipt:
        receipt = self.receipt(index)
        path = self.shard_path(index)
        if not path.exists():
            raise CacheError(f"{path}: shard {index} is missing")
        if (size := path.stat().st_size) != receipt.bytes:
            raise CacheError(f"{path}: {size} bytes, its receipt says {receipt.bytes}")
        if sha256_file(path) != receipt.sha256:
            raise CacheError(f"{path}: its bytes have changed since it was written (sha256 differs)")
        if receipt.tail_prior_sha256 is not None:
            tail = self._tail_sum_path(index)
            if not tail.exists():
                raise CacheError(f"{tail}: the summed tail of shard {index} is missing")
            if sha256_file(tail) != receipt.tail_prior_sha256:
                raise CacheError(f"{tail}: its bytes have changed since it was written (sha256 differs)")
        return receipt

    def write_shard(self, index: int, rows: Rows, tail_sum: np.ndarray | None, seconds: float) -> Receipt:
        """Write a shard, its summed tail (float64 `[V]`), then its receipt. Raises OSError (disk full)."""
        mask = rows["loss_mask"].values
        stored = int(mask.sum())
        written = shard_file.write_shard(self.shard_path(index), rows, self.manifest, index)
        tail_mass, unc = sums(rows)
        tail_written = None
        if tail_sum is not None:
            metadata = {b"stored_positions": str(stored).encode()}
            table = pa.table({"tail_sum": np.ascontiguousarray(tail_sum, np.float64)}).replace_schema_metadata(metadata)
            tail_written = shard_file.write_table(self._tail_sum_path(index), table, ["tail_sum"])
        receipt = Receipt(
            cache_id=self._cache_id,
            shard=index,
            rows=len(rows),
            tokens=rows.tokens,
            stored_positions=stored,
            entries=len(rows["top_ids"].values),
            bytes=written.bytes,
            sha256=written.sha256,
            tail_prior_sha256=tail_written.sha256 if tail_written else None,
            sum_tail_mass=tail_mass,
            sum_unc=unc,
            seconds=seconds,
        )
        write_model(self.receipt_path(index), receipt)
        return receipt

    def read_shard(self, index: int, columns: Sequence[str] | None = None) -> Rows:
        """Rows of shard `index`, structure and page checksums verified. Raises CacheError."""
        return shard_file.read_shard(self.shard_path(index), self.manifest, index, columns)

    def seal(self, card: str) -> None:
        """Write what the whole cache says: the mean tail distribution and, last, the card."""
        receipts = self.receipts()
        if all(receipt.tail_prior_sha256 for receipt in receipts):
            total = np.zeros(self.manifest.vocabulary_size)
            stored = 0
            for index, receipt in enumerate(receipts):
                total += self._read_float_column(self._tail_sum_path(index), "tail_sum", np.float64)
                stored += receipt.stored_positions
            mean = pa.table({"tail_prior": (total / max(1, stored)).astype(np.float32)})
            shard_file.write_table(self.path / TAIL_PRIOR, mean, ["tail_prior"])
        write_bytes(self.path / CARD, card.encode())

    @property
    def is_sealed(self) -> bool:
        return (self.path / CARD).exists()

    @property
    def lacks_tail_prior(self) -> bool:
        """Whether the mean tail distribution is missing though every shard has its part of it."""
        return not (self.path / TAIL_PRIOR).exists() and all(r.tail_prior_sha256 for r in self.receipts())

    def tail_prior(self) -> np.ndarray | None:
        """Mean over stored positions of the teacher's mass on each id outside the kept set: float32 `[V]`.

        It sums to the mean tail mass. None where the engine could not give it.
        """
        path = self.path / TAIL_PRIOR
        return self._read_float_column(path, "tail_prior", np.float32) if path.exists() else None

    def _read_float_column(self, path: Path, name: str, dtype: type[np.floating]) -> np.ndarray:
        try:
            values = pq.read_table(path, page_checksum_verification=True)[name].to_numpy()
        except (pa.ArrowException, OSError, KeyError) as error:
            raise CacheError(f"{path}: unreadable ({str(error).splitlines()[0][:120]})") from None
        if values.dtype != dtype or len(values) != self.manifest.vocabulary_size or not (values >= 0).all():
            raise CacheError(f"{path}: not {self.manifest.vocabulary_size} non-negative {np.dtype(dtype).name}")
        return values

    def column(self, *names: str) -> Iterator[Rows]:
        """Only these columns, shard by shard."""
        for index in range(len(self.manifest.shards)):
            yield self.read_shard(index, names)
