"""A cache, in a directory or behind a URL: manifest, shards with their receipts, tail prior, tokenizer, card.

Order of events, which is what makes a kill at any moment harmless:

0. a cache with a sketch gets `sketch.safetensors`, whose checksum is part of its identity;
1. the folder gets `manifest.json`: from here on it belongs to one identity; then its tokenizer copy;
2. a shard appears, then its summed tail, then its receipt; a shard without a receipt is written again;
3. when every receipt is there, `tail_prior.parquet`, its receipt and at last `README.md` (the card) seal the cache.

`pipeline pull --shards` makes a cache of which only some shards are there; `partial.json` names them.

Shards are a fixed function of the manifest, so doing one twice, or in two processes at once, is harmless.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import copies
from storage import shard as shard_file
from storage.contained import ContainedPath
from storage.errors import CacheError, RunError
from storage.files import remove_temporaries, sha256_file, sync_directory, temporary_for, write_bytes
from storage.json_text import parse_json
from storage.limits import COPIES_BYTES, SHARD_BYTES, STORE_SECONDS, TOKENIZER_BYTES, UNPACKED_PER_BYTE
from storage.manifest import (
    Manifest,
    Part,
    PriorReceipt,
    Receipt,
    SketchIdentity,
    read_manifest,
    read_part,
    read_prior_receipt,
    read_receipt,
    write_model,
)
from storage.new_path import check_new_path
from storage.places import Place, RemotePath, place
from storage.rows import Rows
from storage.sketch_file import NAME as SKETCH
from storage.sketch_file import SketchFile, most_bytes
from storage.words import are, counted

MANIFEST = "manifest.json"
CARD = "README.md"
TOKENIZER = "tokenizer"
TAIL_PRIOR = "tail_prior.parquet"
PRIOR_RECEIPT = "tail_prior.json"
SHARDS = "shards"
# Each shard's summed tail; kept beside the shards so that a lost shard can be made again.
TAIL_SUMS = "tail_sums"
PARTIAL = "partial.json"
# Fields of a tokenizer's configuration whose text is never opened.
_NO_PATHS = {"name_or_path", "chat_template"}
# Of a tokenizer: those of the Hub have a dozen.
MOST_TOKENIZER_FILES = 1000
_DEEPEST_TOKENIZER = 4
# Bytes of a file of one float64 per vocabulary id, at most, and of one without any.
_FLOATS, _FILE = 16, 1 << 20
_MOST_SKETCH_BYTES = 4 << 30
# The tokenizer file that is uploaded last; a remote tokenizer without it is not whole.
_TOKENIZER_LAST = "tokenizer_config.json"
# Metadata of a summed or mean tail.
_POSITIONS = b"stored_positions"
MADE_AGAIN = "repeat the `pipeline cache-teacher`, push or pull that made the cache"
# Small remote files read at a time.
_READERS = 16


def residual_sum(rows: Rows) -> float | None:
    """Residual mass summed over the stored positions, as a receipt says it; None where it is not kept."""
    mass = rows.lists.get("residual_mass")
    return None if mass is None else float(mass.values.sum(dtype=np.float64))


def sums(rows: Rows) -> tuple[float, float]:
    """Tail mass and UNC summed over the stored positions, as a receipt says them."""
    mask = rows["loss_mask"].values
    tail = rows["tail_logmass"].values[mask].astype(np.float64)
    gold = rows["gold_logprob"].values[mask].astype(np.float64)
    # Rounding may lift a sure teacher's log-probability above 0; a false one overflows, and differs from any receipt.
    with np.errstate(over="ignore"):
        return float(np.exp(tail).sum()), max(0.0, float(-np.expm1(gold).sum()))


class Cache:
    """An opened cache. `open` for reading, `create_or_resume` for writing. `path`: where it lies, a Path or a URL."""

    def __init__(self, where: Place, manifest: Manifest) -> None:
        self.path = place(where)
        self.manifest = manifest
        self._cache_id = manifest.cache_id
        self._receipts: dict[int, Receipt] = {}  # of remote shards
        self._tokenizer: Path | None = None  # the copy of a remote one

    @classmethod
    def open(cls, where: str | Place) -> Cache:
        """Raises CacheError where there is no cache, or one this program cannot read."""
        path = place(where)
        if isinstance(path, Path) and not path.is_dir():
            found = "is a file, not a directory" if path.exists() else "no such directory"
            raise CacheError(f"{path}: {found}; a cache is the directory that `pipeline cache-teacher` wrote")
        return cls(path, read_manifest(path / MANIFEST))

    @classmethod
    def check_target(cls, where: str | Place) -> None:
        """Raises UserError unless `where` can become a cache: absent, empty, or a cache already."""
        path = place(where)
        if isinstance(path, RemotePath):
            path.check_reachable()
        else:
            check_new_path(path)
            if not path.exists():
                return
            if not path.is_dir():
                raise CacheError(f"{path}: is a file; --output wants a directory")
        if not (path / MANIFEST).exists():
            # A sketch comes before the manifest that names it.
            strange = [entry.name for entry in path.iterdir() if entry.name[:1] != "." and entry.name != SKETCH]
            # Another process may have claimed it since the look above.
            if strange and not (path / MANIFEST).exists():
                raise CacheError(
                    f"{path}: holds other files ({', '.join(sorted(strange)[:3])}) and no cache; name a new directory"
                )

    @classmethod
    def resume(cls, where: str | Place, manifest: Manifest) -> Cache | None:
        """The cache of this identity that lies at `where`, or None where nothing does; writes nothing.

        Raises CacheError, with the differences named, where another cache lies there.
        """
        path = place(where)
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
    def create_or_resume(cls, where: str | Place, manifest: Manifest) -> Cache:
        """`resume`, or claim `where` for `manifest`; then make its folders and clear what killed writers left."""
        path = place(where)
        cache = cls.resume(path, manifest)
        if cache is None:
            path.mkdir(parents=True, exist_ok=True)
            try:
                write_model(path / MANIFEST, manifest, exclusive=True)
            except FileExistsError:
                # Another process was first: with the same manifest, or `resume` refuses.
                cls.resume(path, manifest)
            cache = cls(path, manifest)
        if isinstance(path, Path):
            remove_temporaries(path)
            for folder in (SHARDS, TAIL_SUMS):
                (path / folder).mkdir(exist_ok=True)
                remove_temporaries(path / folder)
        return cache

    @property
    def sketch_path(self) -> ContainedPath | RemotePath:
        return self.path / SKETCH

    @classmethod
    def claim_sketch(cls, where: str | Place, data: bytes) -> bytes:
        """Put a sketch where no cache is yet, unless one is there; the bytes there now, which all workers read.

        Raises OSError.
        """
        path = place(where)
        path.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            write_bytes(path / SKETCH, data, exclusive=True)
        return (path / SKETCH).read_at_most(_MOST_SKETCH_BYTES, "a sketch")

    @classmethod
    def claimed_sketch(cls, where: str | Place) -> bytes | None:
        """What `claim_sketch` left there, or None."""
        path = place(where) / SKETCH
        try:
            return path.read_at_most(_MOST_SKETCH_BYTES, "a sketch")
        except FileNotFoundError:
            return None

    def write_sketch(self, data: bytes) -> None:
        """Put back the sketch that the manifest names. Raises CacheError where these bytes are another."""
        if hashlib.sha256(data).hexdigest() != self._sketch.sha256:
            raise CacheError(
                f"{self.sketch_path}: missing or damaged, and what this machine makes in its place is not what the "
                "shards were made with; copy it from where the cache was pushed to, or name a new --output"
            )
        write_bytes(self.sketch_path, data)

    def check_sketch(self) -> None:
        """Compare the sketch, where there is to be one, with its checksum. Raises CacheError."""
        if self.manifest.scoring.sketch is not None:
            self.sketch(fresh=True)

    def sketch(self, *, fresh: bool = False) -> SketchFile:
        """The cache's sketch, compared with its checksum. Raises CacheError where it is missing, damaged or another.

        fresh: fetch a remote one even where a copy is there.
        """
        return SketchFile.from_bytes(
            self.sketch_bytes(fresh=fresh),
            self.sketch_path,
            rank=self._sketch.rank,
            vocabulary_size=self.manifest.vocabulary_size,
        )

    def sketch_bytes(self, *, fresh: bool = False) -> bytes:
        """The file behind `sketch`."""
        path, sha256 = self.sketch_path, self._sketch.sha256
        if sha256 is None:
            raise CacheError(f"{self.path / MANIFEST}: the manifest is damaged: it names no checksum of the sketch")
        try:
            size = path.stat().st_size
            if size > most_bytes(self._sketch.rank, self.manifest.vocabulary_size):
                raise CacheError(f"{path}: has {size} bytes, more than a sketch of rank {self._sketch.rank} can have")
            if isinstance(path, RemotePath):
                with copies.open_copy(path, sha256, size, fresh=fresh) as file:
                    return file.read()
            data = path.read_at_most(size, "the sketch")
        except FileNotFoundError:
            raise CacheError(f"{path}: the sketch of this cache is missing") from None
        except OSError as error:
            raise CacheError(f"{path}: cannot be read ({error.strerror or error})") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CacheError(f"{path}: its bytes have changed since it was written (sha256 differs)")
        return data

    @property
    def _sketch(self) -> SketchIdentity:
        if (sketch := self.manifest.scoring.sketch) is None:
            raise CacheError(f"{self.path}: this cache has no sketch; it was made without --sketch-rank")
        return sketch

    @property
    def tokenizer_path(self) -> Path:
        """A private folder with a copy of the teacher's tokenizer, whose files were read and looked through.

        What loads it follows names inside these files, so nothing may lie there that could be swapped or that leads
        elsewhere. Raises CacheError where there is none, or one that names other files.
        """
        if self._tokenizer is None:
            self._tokenizer = self._private_tokenizer()
        return self._tokenizer

    def _private_tokenizer(self) -> Path:
        files = self._tokenizer_bytes()
        digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
        if isinstance(self.path, RemotePath):
            target = copies.folder() / f"tokenizer-{digest}"
        else:
            target = _own_folder() / f"tokenizer-{digest}"

        def fill(folder: Path) -> None:
            for name, data in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)

        _folder(target, fill)
        return target

    def _tokenizer_bytes(self) -> dict[str, bytes]:
        """The tokenizer's files, by their paths in its folder.

        Raises CacheError for a link, for too much of them, and for one that names files that are not the tokenizer's.
        """
        folder = self.path / TOKENIZER
        if isinstance(folder, RemotePath):
            found: Iterable[tuple[str, Place]] = _remote_files(folder)
        else:
            if not folder.is_dir():
                raise CacheError(f"{folder}: there is no tokenizer here")
            found = ((path.relative_to(folder).as_posix(), path) for path in folder.files())
        files: dict[str, bytes] = {}
        total, most = 0, TOKENIZER_BYTES.value
        for name, path in found:
            if len(files) == MOST_TOKENIZER_FILES:
                raise CacheError(f"{folder}: has more than {MOST_TOKENIZER_FILES} files, as no tokenizer has")
            total += path.stat().st_size
            TOKENIZER_BYTES.check(folder, total, "a tokenizer")
            files[name] = place(path).read_at_most(most, "a tokenizer")
        if not files:
            raise CacheError(f"{folder}: there is no tokenizer here")
        check_tokenizer_files(files, str(folder))
        return files

    def tokenizer_files(self) -> list[str]:
        """The tokenizer's files by their paths in its folder, as they go with the cache to another place.

        Raises CacheError for a link: what it leads to may be any file of this machine.
        """
        return sorted(self._tokenizer_bytes())

    def copy_tokenizer(self, target: Path) -> None:
        """Copy the tokenizer's files into the folder `target`. Raises CacheError as `tokenizer_path` does."""
        files = self._tokenizer_bytes()
        for name, data in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)

    def write_tokenizer(self, save: Callable[[Path], object]) -> None:
        """Let `save` fill a folder, whose files then are the cache's tokenizer; nothing where it has one.

        Locally they appear together or not at all. Raises what `save` raises.
        """
        if isinstance(self.path, Path):
            _folder(self.path / TOKENIZER, save)
            return
        target = self.path / TOKENIZER
        if (target / _TOKENIZER_LAST).exists():
            return
        with tempfile.TemporaryDirectory(prefix="teacher-logit-cache-") as folder:
            save(Path(folder))
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path == Path(folder) / _TOKENIZER_LAST):
                (target / path.relative_to(folder).as_posix()).upload(path)

    def shard_path(self, index: int) -> ContainedPath | RemotePath:
        return self.path / SHARDS / f"part-{index:05d}.parquet"

    def receipt_path(self, index: int) -> ContainedPath | RemotePath:
        return self.path / SHARDS / f"part-{index:05d}.json"

    def tail_sum_path(self, index: int) -> ContainedPath | RemotePath:
        return self.path / TAIL_SUMS / f"part-{index:05d}.parquet"

    @property
    def shards_here(self) -> Sequence[int]:
        """Numbers of the shards that belong here: all, or what `pipeline pull --shards` asked for."""
        count = len(self.manifest.shards)
        path = self.path / PARTIAL
        if isinstance(self.path, RemotePath) or not path.exists():
            return range(count)
        shards = sorted(set(read_part(path).shards))
        if not 0 <= shards[0] <= shards[-1] < count:
            raise CacheError(
                f"{path}: names shards beyond the plan's {count}; repeat the `pipeline pull` that wrote it"
            )
        return shards

    @property
    def is_partial(self) -> bool:
        return len(self.shards_here) < len(self.manifest.shards)

    def expect(self, shards: Iterable[int]) -> None:
        """Note which shards belong here, in a local cache; all of them is what goes without saying."""
        wanted = sorted(shards)
        if len(wanted) < len(self.manifest.shards):
            write_model(self.path / PARTIAL, Part(shards=tuple(wanted)))
        elif isinstance(self.path, Path) and (self.path / PARTIAL).exists():
            (self.path / PARTIAL).unlink(missing_ok=True)

    def receipt(self, index: int) -> Receipt:
        """Raises CacheError where it is missing, damaged, or of another shard or cache."""
        path = self.receipt_path(index)
        receipt = read_receipt(path)
        # A plan may say any number; a file of so many bytes holds no more tokens.
        if receipt.tokens > UNPACKED_PER_BYTE * receipt.bytes + SHARD_BYTES.value:
            raise CacheError(f"{path}: says {receipt.tokens:,} tokens in {receipt.bytes:,} bytes; {SHARD_BYTES.advice}")
        if receipt.cache_id != self._cache_id or receipt.shard != index:
            raise CacheError(
                f"{path}: this receipt belongs to shard {receipt.shard} of cache {receipt.cache_id}, "
                f"not to shard {index} of {self._cache_id}"
            )
        if receipt.rows != self.manifest.shards[index].sequences:
            raise CacheError(
                f"{path}: {counted(receipt.rows, 'row')}, the plan says {self.manifest.shards[index].sequences}"
            )
        return receipt

    def receipts(self, *, partial: bool = False) -> list[Receipt]:
        """Of every shard. Raises CacheError, saying how far the cache is, where some are not done.

        partial: of the shards that belong here are enough.
        """
        if self.is_partial and not partial:
            raise CacheError(
                f"{self.path}: holds {len(self.shards_here)} of {counted(len(self.manifest.shards), 'shard')}, pulled "
                "with --shards; `pipeline pull` the rest, or use the URL itself"
            )
        there = {path.name for path in (self.path / SHARDS).glob("*.json")}
        pending = [index for index in self.shards_here if self.receipt_path(index).name not in there]
        if pending:
            raise CacheError(
                f"{self.path}: unfinished, {len(pending)} of {counted(len(self.shards_here), 'shard')} "
                f"{are(len(pending))} missing (first: {self.shard_path(pending[0]).name}); "
                "repeat the `pipeline cache-teacher`, push or pull that began it"
            )
        with ThreadPoolExecutor(_READERS) as readers:
            receipts = list(readers.map(self.receipt, self.shards_here))
        if isinstance(self.path, RemotePath):
            self._receipts = dict(zip(self.shards_here, receipts, strict=True))
        return receipts

    def is_done(self, index: int) -> bool:
        """Whether a shard is there, whole: its receipt is good and `check_file` finds nothing."""
        try:
            self.check_file(index)
        except CacheError:
            return False
        return True

    def check_file(self, index: int, *, fetch: bool = False) -> Receipt:
        """Compare a shard with its receipt. Raises CacheError.

        Locally byte for byte; a remote one by its length, because its bytes are compared whenever they are fetched.
        fetch: fetch it now.
        """
        try:
            return self._check_file(index, fetch)
        except OSError as error:
            raise CacheError(f"{self.shard_path(index)}: cannot be read ({error.strerror or error})") from None

    def check_length(self, index: int) -> Receipt:
        """Compare a shard's length with its receipt, and no byte. Raises CacheError."""
        path = self.shard_path(index)
        receipt = self._known_receipt(index) if isinstance(path, RemotePath) else self.receipt(index)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise CacheError(f"{path}: shard {index} is missing") from None
        except OSError as error:
            raise CacheError(f"{path}: cannot be read ({error.strerror or error})") from None
        if size != receipt.bytes:
            raise CacheError(f"{path}: {counted(size, 'byte')}, its receipt says {receipt.bytes}")
        return receipt

    def _check_file(self, index: int, fetch: bool) -> Receipt:
        path = self.shard_path(index)
        if isinstance(path, RemotePath) and fetch:
            self._receipts.pop(index, None)
        receipt = self.check_length(index)
        if isinstance(path, RemotePath):
            if not fetch:
                return receipt
            copies.open_copy(path, receipt.sha256, receipt.bytes, fresh=True).close()
        elif sha256_file(path) != receipt.sha256:
            raise CacheError(f"{path}: its bytes have changed since it was written (sha256 differs)")
        if receipt.tail_prior_sha256 is not None:
            tail = self.tail_sum_path(index)
            if not tail.exists():
                raise CacheError(f"{tail}: the summed tail of shard {index} is missing")
            if sha256_file(tail) != receipt.tail_prior_sha256:
                raise CacheError(f"{tail}: its bytes have changed since it was written (sha256 differs)")
        return receipt

    def check_counts(self, index: int, rows: Rows) -> None:
        """Compare the counts of a shard's rows with its receipt. Raises CacheError."""
        receipt = self._known_receipt(index)
        found = (len(rows), rows.tokens, int(rows["loss_mask"].values.sum()), len(rows["top_ids"].values))
        said = (receipt.rows, receipt.tokens, receipt.stored_positions, receipt.entries)
        if found != said:
            path = self.receipt_path(index)
            raise CacheError(f"{path}: says rows, tokens, positions, entries {said}, the shard has {found}")

    def write_shard(
        self,
        index: int,
        rows: Rows,
        tail_sum: np.ndarray | None,
        seconds: float,
        sum_sketch_kl: float | None = None,
    ) -> Receipt:
        """Write a shard, its summed tail (float64 `[V]`), then its receipt. Raises OSError (disk full).

        sum_sketch_kl: over the stored positions, nats from the teacher to what its codes give back.
        """
        mask = rows["loss_mask"].values
        stored = int(mask.sum())
        written = shard_file.write_shard(self.shard_path(index), rows, self.manifest, index)
        tail_mass, unc = sums(rows)
        tail_written = None
        if tail_sum is not None:
            table = pa.table({"tail_sum": np.ascontiguousarray(tail_sum, np.float64)})
            table = table.replace_schema_metadata(_positions(stored))
            tail_written = shard_file.write_table(self.tail_sum_path(index), table, ["tail_sum"])
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
            sum_sketch_kl=sum_sketch_kl,
            sum_residual_mass=residual_sum(rows),
            seconds=seconds,
        )
        write_model(self.receipt_path(index), receipt)
        self._receipts.pop(index, None)
        return receipt

    def read_shard(self, index: int, columns: Sequence[str] | None = None, *, page_checksums: bool = True) -> Rows:
        """Rows of shard `index`, structure and, unless told otherwise, page checksums verified. Raises CacheError."""
        path = self.shard_path(index)
        if isinstance(path, Path):
            return shard_file.read_shard(path, self.manifest, index, columns, page_checksums=page_checksums)
        receipt = self._known_receipt(index)
        try:
            with copies.open_copy(path, receipt.sha256, receipt.bytes) as file:
                return shard_file.read_shard(path, self.manifest, index, columns, file, page_checksums=page_checksums)
        except FileNotFoundError:
            raise CacheError(f"{path}: shard {index} is missing") from None

    def prefetch(self, index: int, *, room: int = 1) -> Future[None] | None:
        """Say that shard `index` will be read soon: a remote one is fetched in the background.

        Returns when that is done; None where nothing is: of a local one, or where the local copies cannot hold `room`
        shards of its size.
        """
        path = self.shard_path(index)
        if not isinstance(path, RemotePath):
            return None
        receipt = self._known_receipt(index)
        if room * receipt.bytes > COPIES_BYTES.value:
            return None
        return copies.prefetch(path, receipt.sha256, receipt.bytes)

    def _known_receipt(self, index: int) -> Receipt:
        if index not in self._receipts:
            self._receipts[index] = self.receipt(index)
        return self._receipts[index]

    def tail_sum(self, index: int) -> np.ndarray:
        """The summed tail of shard `index`, float64 `[V]`. Raises CacheError for a damaged one, OSError without one."""
        path = self.tail_sum_path(index)
        return self._float_column(path, self._float_bytes(path), "tail_sum", np.float64)[0]

    def _float_bytes(self, path: ContainedPath | RemotePath) -> bytes:
        """The bytes of a file of one number per vocabulary id."""
        return path.read_at_most(_FLOATS * self.manifest.vocabulary_size + _FILE, "numbers of a vocabulary")

    def seal(self, card: str) -> None:
        """Write what the whole cache says: the mean tail distribution and, last, the card."""
        receipts = self.receipts()
        if all(receipt.tail_prior_sha256 for receipt in receipts):
            total = np.zeros(self.manifest.vocabulary_size)
            stored = 0
            for index, of_shard in enumerate(receipts):
                total += self.tail_sum(index)
                stored += of_shard.stored_positions
            mean = pa.table({"tail_prior": (total / max(1, stored)).astype(np.float32)})
            mean = mean.replace_schema_metadata(_positions(stored))
            written = shard_file.write_table(self.path / TAIL_PRIOR, mean, ["tail_prior"])
            receipt = PriorReceipt(cache_id=self._cache_id, sha256=written.sha256)
            write_model(self.path / PRIOR_RECEIPT, receipt)
        write_bytes(self.path / CARD, card.encode())

    @property
    def is_sealed(self) -> bool:
        card = self.path / CARD
        return card.is_file() if isinstance(card, Path) else card.exists()

    @property
    def has_tail_prior(self) -> bool:
        """Without reading it. Raises CacheError where its receipt is missing or another cache's."""
        return self.prior_receipt() is not None

    @property
    def lacks_tail_prior(self) -> bool:
        """Whether the mean tail distribution is missing or damaged though every shard has its part of it."""
        try:
            return self.tail_prior() is None and all(r.tail_prior_sha256 for r in self.receipts())
        except CacheError:
            return True

    def tail_prior(self) -> np.ndarray | None:
        """Mean over stored positions of the teacher's mass on each id outside the kept set: float32 `[V]`.

        It sums to the mean tail mass. None where the engine could not give it. Raises CacheError where it is not the
        one that its receipt names.
        """
        weighed = self.weighed_tail_prior()
        return None if weighed is None else weighed[0]

    def weighed_tail_prior(self) -> tuple[np.ndarray, int] | None:
        """`tail_prior`, and how many positions its mean is over: the whole cache's, of which a part may be here."""
        path = self.path / TAIL_PRIOR
        receipt = self.prior_receipt()
        if receipt is None:
            return None
        try:
            data = self._float_bytes(path)
        except FileNotFoundError:
            raise CacheError(f"{path}: missing; {MADE_AGAIN}") from None
        except OSError as error:
            raise CacheError(f"{path}: cannot be read ({error.strerror or error})") from None
        if hashlib.sha256(data).hexdigest() != receipt.sha256:
            raise CacheError(f"{path}: its bytes have changed since it was written (sha256 differs)")
        return self._float_column(path, data, "tail_prior", np.float32)

    def prior_receipt(self) -> PriorReceipt | None:
        """Of the tail prior; None where there is neither. Raises CacheError where one of them is alone."""
        path = self.path / PRIOR_RECEIPT
        if not path.exists():
            if (self.path / TAIL_PRIOR).exists():
                raise CacheError(f"{path}: the receipt of the tail prior is missing; {MADE_AGAIN}")
            return None
        receipt = read_prior_receipt(path)
        if receipt.cache_id != self._cache_id:
            raise CacheError(f"{path}: belongs to cache {receipt.cache_id}, not to {self._cache_id}")
        return receipt

    def _float_column(self, path: Place, data: bytes, name: str, dtype: type[np.floating]) -> tuple[np.ndarray, int]:
        """One float per vocabulary id, and the number of positions it is about. Raises CacheError."""
        vocabulary = self.manifest.vocabulary_size
        wrong = CacheError(f"{path}: not {vocabulary} non-negative {np.dtype(dtype).name}")
        try:
            source = io.BytesIO(data)
            with pq.ParquetFile(source, page_checksum_verification=True) as parquet:
                if parquet.metadata.num_rows != vocabulary:
                    raise wrong
                said = (parquet.schema_arrow.metadata or {}).get(_POSITIONS, b"")
                values = shard_file.read_checked(parquet, source, {name: vocabulary}, [name])[name].to_numpy()
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise CacheError(f"{path}: unreadable ({str(error).splitlines()[0][:120]})") from None
        if values.dtype != dtype or len(values) != vocabulary or not ((values >= 0) & (values < np.inf)).all():
            raise wrong
        if not (said.isdigit() and len(said) < 16):
            raise CacheError(f"{path}: does not say how many positions it is about")
        return values, int(said)

    def column(self, *names: str) -> Iterator[Rows]:
        """Only these columns, shard by shard; of remote shards no more than these is fetched."""
        for index in self.shards_here:
            path = self.shard_path(index)
            if isinstance(path, Path):
                yield self.read_shard(index, names)
                continue
            try:
                with path.open() as file:
                    rows = shard_file.read_shard(path, self.manifest, index, names, file)
            except FileNotFoundError:
                raise CacheError(f"{path}: shard {index} is missing") from None
            yield rows


def check_tokenizer_files(files: Mapping[str, bytes], where: str) -> None:
    """Raise CacheError for a tokenizer whose configuration names files that are not its own.

    transformers loads what `vocab_file`, `fast_tokenizer_files`, `vocab`, `source_spm` and their like name, wherever it
    is. files: by their paths in the tokenizer's folder.
    """
    for name in sorted(files):
        if not name.endswith(".json"):
            continue
        try:
            value = parse_json(files[name])
        except ValueError:
            continue
        if not isinstance(value, dict):
            continue
        for key, named in value.items():
            names_files = re.search(r"_files?$", key)
            for each in named if isinstance(named, list) else [named]:
                # Some classes take the contents or a name; and what a program takes for a path is one.
                is_path = isinstance(each, str) and key not in _NO_PATHS and _names_a_file(key, each)
                if ((each is not None and names_files) or is_path) and not (isinstance(each, str) and each in files):
                    raise CacheError(
                        f"{where}/{name}: {key} names a file that is not the tokenizer's own ({str(each)[:80]!r})"
                    )


def _names_a_file(key: str, value: str) -> bool:
    """Whether a value of a tokenizer's configuration is, or may be, the path of a file."""
    if re.search(r"(^|_)(vocab|merges|spm|path)$", key):
        return True
    return 0 < len(value) < 4096 and "\0" not in value and os.path.isabs(value) and os.path.isfile(value)


@functools.cache
def _own_folder() -> Path:
    """A folder of this process, for this user alone, that goes when it ends."""
    folder = tempfile.mkdtemp(prefix="teacher-logit-cache-")
    owner = os.getpid()

    def remove() -> None:
        # A forked worker that ends leaves its parent's.
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def _positions(stored: int) -> dict[bytes, bytes]:
    return {_POSITIONS: str(stored).encode()}


def _remote_files(root: RemotePath) -> list[tuple[str, RemotePath]]:
    """Return the files below a remote folder, by their paths in it; names that could lead out of it are passed over.

    Raises CacheError for more entries than a tokenizer has, folders and empty files among them, and RunError where
    their names and sizes are not told in time.
    """
    until = time.monotonic() + STORE_SECONDS.value
    found: list[tuple[str, RemotePath]] = []
    folders = [("", root, 0)]
    entries = 0
    while folders:
        prefix, folder, depth = folders.pop()
        for path in folder.iterdir():
            entries += 1
            if entries > MOST_TOKENIZER_FILES:
                raise CacheError(f"{root}: has more than {MOST_TOKENIZER_FILES} files, as no tokenizer has")
            if time.monotonic() > until:
                raise RunError(
                    f"{root}: its files are not listed within {STORE_SECONDS.value} s; {STORE_SECONDS.advice}"
                )
            if set(path.name) & set("/\\:\0"):
                continue
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                size = 0
            if size:
                found.append((prefix + path.name, path))
            elif depth < _DEEPEST_TOKENIZER:
                folders.append((f"{prefix}{path.name}/", path, depth + 1))
    return found


def _folder(target: Path, fill: Callable[[Path], object]) -> None:
    """A folder that `fill` fills, which appears whole or not at all; nothing where it is there already."""
    if target.exists():
        return
    temporary = temporary_for(target)
    try:
        temporary.mkdir()
        fill(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and target.exists():
            return  # Another process was first.
        raise
    sync_directory(target.parent)
