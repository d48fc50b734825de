"""`export`: a trained adapter as a folder to hand on."""

from __future__ import annotations

import json
import re
import shutil
import stat
import struct
from collections.abc import Mapping
from pathlib import Path

from harness import installed, storage
from harness.commands import peft_experiment, target
from harness.errors import InputError, unknown
from harness.record.record import ADAPTER, RunRecord, at
from harness.record.store import RecordStore
from harness.report.redact import HOMES, cut, cut_config, handed_on

FORMS = ("adapter", "peft-experiment")  # of what is exported
MOST_HEADER = 100_000_000  # bytes of a safetensors header, as the format has it


def command(results: Path, run_id: str, to: Path, rank: str | None = None, form: str = FORMS[0]) -> int:
    """Make the folder of this form, one of FORMS; see `_adapter` and `peft_experiment.command`."""
    if form not in FORMS:
        raise unknown("form of export (--as)", form, FORMS)
    if form == FORMS[0]:
        return _adapter(results, run_id, to, rank)
    if rank is not None:
        raise InputError(f"--rank {rank} is for an adapter that was trained; --as {form} is of one that is not", rank)
    return peft_experiment.command(results, run_id, to)


def _adapter(results: Path, run_id: str, to: Path, rank: str | None) -> int:
    """Make the folder `to` with the run's adapter, a model card (README.md) and its record (record.json). `rank`: the
    adapter as it was cut to this rank for the run's rank curve, in place of the whole one.

    Nothing in it names a place of this machine, its host or its user, and no link is followed. Raises InputError for an
    unknown run, one that kept no adapter (at this rank), an adapter with something in it that is no plain file or
    cannot be handed on, or a folder that is there already or cannot be made.
    """
    from harness.commands.boards import boards_below
    from harness.report.forms.card import model_card

    target.check_new(to)
    store, boards = boards_below(results)
    record = store.find(run_id)
    adapter = ADAPTER if rank is None else _at_rank(store, record, rank)
    names, method = _files(store, record, adapter), record.spec.method
    known = names, installed.provenance_of([method])[method], installed.loaders_of(method)
    card = model_card(record, boards, *known) if rank is None else _card_at(record, int(rank), *known)
    with target.made(to) as draft:
        for name in names:
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            _hand_on(store, record, f"{adapter}/{name}", draft / name)
        (draft / "README.md").write_text(card, encoding="utf-8")
        files = storage.file_sums(draft)
        (draft / "record.json").write_text(handed_on(record).model_copy(update={"files": files}).to_json())
    at_rank = "" if rank is None else f" at rank {int(rank)}"
    print(f"adapter{at_rank}, README.md and record.json of {run_id} are in {to}")
    return 0


def _at_rank(store: RecordStore, record: RunRecord, rank: str) -> str:
    """The folder's name of the run's adapter cut to this rank. Raises InputError where the run kept none."""
    if not re.fullmatch("[1-9][0-9]{0,8}", rank):
        raise InputError(f"--rank = '{rank}' is not allowed: give a whole number from 1 up", rank)
    kept = [each for each in record.rank_curve if (store.folder(record.run_id) / f"{ADAPTER}_{at(each)}").exists()]
    if int(rank) in kept:
        return f"{ADAPTER}_{at(int(rank))}"
    if kept:
        raise InputError(f"run '{record.run_id}' kept no adapter at rank {rank}, but at {', '.join(map(str, kept))}")
    place = record.spec.place
    if place.save_adapter and place.rank_curve and record.status == "done":
        why = f"'{record.spec.method}' as it was set has no cut to a rank"
    else:
        why = "delete its folder and run it again with --save-adapter --rank-curve 1,2,4,8"
    raise InputError(f"run '{record.run_id}' kept no adapter at any rank: {why}")


def _card_at(record: RunRecord, rank: int, names: list[str], provenance: str, loaders: Mapping[str, str]) -> str:
    """The card of the adapter cut to a rank, with what is known of it: its score, and no layer above the rank."""
    from harness.report.forms.card import model_card

    known = {"metrics": {record.headline: record.rank_curve[rank]}, "parameters": None}
    cut = record.model_copy(update=known | {"ranks": {name: min(own, rank) for name, own in record.ranks.items()}})
    return (
        f"{model_card(cut, [], names, provenance, loaders)}\n## Cut to rank {rank}\n\n"
        f"In every layer at most {rank} components of what was trained are left, by the method's own measure; nothing "
        "was trained after the cut. Scores and ranks above are those of the cut adapter.\n"
    )


def _files(store: RecordStore, record: RunRecord, name: str) -> list[str]:
    """Every file of the adapter, by its path there."""
    adapter = store.folder(record.run_id) / name
    try:
        found = plain_files(adapter)
    except FileNotFoundError:
        found = []
    except OSError as error:
        raise InputError(f"'{error.filename}' cannot be read ({error.strerror})") from None
    if not found:
        raise InputError(
            f"run '{record.run_id}' kept no adapter ({record.status}): delete its folder and run it again with "
            "--save-adapter"
        )
    return [path.relative_to(adapter).as_posix() for path in found]


def plain_files(folder: Path) -> list[Path]:
    """Every file below a folder, in order. Raises InputError for a link, or anything else that is neither file nor
    folder, and OSError."""
    mode = folder.lstat().st_mode
    if stat.S_ISREG(mode):
        return [folder]
    if not stat.S_ISDIR(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
        raise InputError(f"'{folder}' is {kind}: only plain files are handed on")
    return [file for path in sorted(folder.iterdir()) for file in plain_files(path)]


def _hand_on(store: RecordStore, record: RunRecord, name: str, copy: Path) -> None:
    """Copy a file of the run, as it may leave the machine."""
    source = store.folder(record.run_id) / name
    try:
        source = store.verified(record.run_id, name)
        if source.suffix == ".safetensors":
            _copy_tensors(source, copy)
            return
        raw = source.read_bytes()
        copy.write_bytes(_cut_json(raw) if source.suffix == ".json" else _cut_bytes(raw, source))
    except OSError as error:
        if error.filename != str(source):
            raise
        raise InputError(f"'{source}' cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not what was written, not JSON, or not safetensors
        if isinstance(error, InputError):
            raise
        raise InputError(f"'{source}' is damaged: {str(error).splitlines()[0]}") from None


def _cut_json(raw: bytes) -> bytes:
    content = json.loads(raw)
    made = cut_config(content)
    return raw if made == content else json.dumps(made, indent=2, sort_keys=True).encode()


def _cut_bytes(raw: bytes, source: Path) -> bytes:
    """Text with its paths cut; of anything else nothing is known but that it may name nobody's home."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = ""
    if text and "\0" not in text:
        return str(cut(text)).encode()
    home = HOMES.search(raw.decode("latin-1"))
    if home:
        raise InputError(f"'{source}' cannot be handed on: it holds a path of this machine ({home[0]})")
    return raw


def _copy_tensors(source: Path, copy: Path) -> None:
    """A safetensors file, the paths in its metadata cut."""
    with source.open("rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else MOST_HEADER
        if size >= MOST_HEADER or len(raw := stream.read(size)) < size:
            raise ValueError("it has no header of safetensors")
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        metadata = header.get("__metadata__")
        if cut(metadata) != metadata:
            raw = json.dumps({**header, "__metadata__": cut(metadata)}, separators=(",", ":")).encode()
            raw += b" " * (-len(raw) % 8)
        with copy.open("wb") as made:
            made.write(struct.pack("<Q", len(raw)) + raw)
            shutil.copyfileobj(stream, made, 1 << 20)
