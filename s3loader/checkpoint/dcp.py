"""What `torch.distributed.checkpoint` needs of us, without torch: attempts that somebody else coordinates.

DCP plans with collectives and calls us on every rank: `Writing.begin` on the coordinator makes the attempt, each rank asks for
its ticket and uploads its part, the coordinator publishes. Planners may keep plans from save to save, so a plan never says
which attempt it is for, only who its coordinator is (`Seat`); the coordinator says the rest in the store. Without collectives,
`Writing.meet` does on every rank what they are for, and every rank publishes, or waits until another one has. The state dict
comes flattened: names with a path each.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from msgspec import structs

from s3loader.checkpoint.checkpoint import Checkpoint
from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import EpochRecord, Part, TicketRecord
from s3loader.checkpoint.manager import CheckpointManager
from s3loader.checkpoint.protocol.commit import Attempt, expect_free, publish, publish_or_wait, tell_failure
from s3loader.checkpoint.protocol.roots import Root
from s3loader.checkpoint.protocol.session import Identity, Session, forget, under_way
from s3loader.checkpoint.rendezvous import Box, meet
from s3loader.checkpoint.state import tree
from s3loader.checkpoint.state.leaves import BYTES, LeafAdapter, Source
from s3loader.checkpoint.writing.resuming import take_over
from s3loader.checkpoint.writing.saver import SavePlan, Saver
from s3loader.checkpoint.writing.staging import SavedPiece, part_size_of, plan_files
from s3loader.errors import CheckpointError, ConfigError, S3LoaderError, StepExistsError
from s3loader.types import ObjectURL

__all__ = ["FlatEntry", "PartWriter", "Seat", "Ticket", "Writing", "flat_entries", "known_url"]

_PROCESS = secrets.token_hex(8)


def known_url(url: str | os.PathLike[str]) -> bool:
    """Whether `open_store` would take it."""
    try:
        ObjectURL.parse(url)
    except ConfigError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a rank must know of an attempt. Pickles."""

    step: int
    attempt: str
    epoch: EpochRecord
    rank: int
    world: int


@dataclass(frozen=True, slots=True)
class Seat:
    """What a plan says of a rank's place in a save, the same for every save of these processes. Pickles."""

    origin: str
    """The coordinator's process."""
    rank: int
    world: int


class Writing:
    """One save that DCP coordinates.

    Args:
        manager: Of the run.
        step: Which; None: the one after the newest.
        overwrite: Whether it may take the place of what is committed; None: where no step was given.
    """

    def __init__(self, manager: CheckpointManager, step: int | None, overwrite: bool | None = None) -> None:
        self._manager, self._step, self._overwrite = manager, step, overwrite
        self._attempt: Attempt | None = None
        self._expected: Root | None = None
        self._part: Part | None = None
        self._told = ""
        self._under_way = under_way(manager.store.url)

    def begin(self, world: int) -> list[Seat]:
        """Begin an attempt; only on the coordinator. Returns each rank's seat.

        Raises:
            StepExistsError: an explicit step is committed already.
        """
        self._expect_free()
        session = self._manager.session()
        step = self._manager.next_step() if self._step is None else self._step
        record = structs.replace(session.record, unfinished=session.unfinished)
        own = Session(session.run, Identity(0, world, "dcp"), record)
        self._attempt = attempt = Attempt(self._manager.run, own, step, session.next_attempt(), self._manager.options.deadline)
        self._expected = expect_free(attempt, replace=bool(self._overwrite))
        self._under_way[attempt.id] = step
        origin = f"{_PROCESS}-{os.getpid():x}"
        if world > 1:
            self._told = layout.ticket_key(origin)
            ticket = TicketRecord(format=records.FORMAT, step=step, attempt=attempt.id, world=world, epoch=record)
            self._manager.run.put(self._told, records.encode(ticket))
        return [Seat(origin, rank, world) for rank in range(world)]

    def ticket(self, seat: Any, rank: int) -> Ticket:
        """The ticket of the save under way.

        Args:
            seat: What the plan says, which may be a plan of an earlier save.
            rank: This rank, as DCP tells it; where it does not, 0.

        Raises:
            CheckpointError: the plan was made for another group of processes, or for another kind of storage.
        """
        known = seat if isinstance(seat, Seat) else None
        if self._attempt is not None and (known is None or known.world == self._attempt.world):
            session = self._attempt.session
            rank = known.rank if known is not None else rank
            return Ticket(self._attempt.step, self._attempt.id, session.record, rank, session.identity.world)
        found = self._manager.run.read(layout.ticket_key(known.origin), TicketRecord) if known is not None else None
        told = found[0] if found is not None else None
        if known is None or told is None or told.world != known.world:
            raise CheckpointError(
                "the plan was made for another save, by other processes or another storage writer",
                url=self._manager.store.url,
                hint="a planner that caches plans keeps them by its class: DefaultSavePlanner(enable_plan_caching=False), or a "
                "class of its own for each group and each kind of storage",
            )
        return Ticket(told.step, told.attempt, told.epoch, known.rank, known.world)

    def _expect_free(self) -> None:
        """Without a step, the new one takes the place of what there is, unless that was forbidden."""
        if self._step is None and self._overwrite is False and (newest := self._manager.latest()) is not None:
            raise StepExistsError(
                f"there is a checkpoint already (step {newest})",
                url=self._manager.store.url,
                hint="overwrite=True puts the new one in its place in one atomic write; or give another path, or step=",
            )

    def meet(self, identity: Identity, boxes: Sequence[Box]) -> tuple[Ticket, list[int]]:
        """Agree with the other ranks, through the store: which attempt this is, and which of its `boxes` this rank writes.

        Raises:
            ConfigError: the ranks do not fit together.
            StepExistsError: the step is committed already.
            IncompleteCheckpointError: ranks did not come in time.
        """
        self._expect_free()
        met = meet(self._manager, identity, self._step, boxes)
        self._attempt, self._expected = met.attempt, met.expected
        self._under_way[met.attempt.id] = met.attempt.step
        record = met.attempt.session.record
        return Ticket(met.attempt.step, met.attempt.id, record, identity.rank, identity.world), met.own

    def publish_or_wait(self) -> Root:
        """Make the checkpoint appear, or wait until another rank has; on every rank of a save that has met.

        Raises:
            IncompleteCheckpointError: another rank has failed, or did not come in time.
        """
        attempt, part, expected = self._begun()
        try:
            root = publish_or_wait(attempt, part, expected, lambda: False, _join)
        finally:
            forget(self._under_way, attempt.id)
        if attempt.rank == 0:
            self._manager.retire()
            with contextlib.suppress(S3LoaderError):  # garbage collection deletes it, too
                self._manager.store.delete(layout.begin_key(attempt.id))
        return root

    def part(self, ticket: Ticket) -> PartWriter:
        """What takes this rank's tensors."""
        session = Session(self._manager.run, Identity(ticket.rank, ticket.world, "dcp"), ticket.epoch)
        attempt = Attempt(self._manager.run, session, ticket.step, ticket.attempt, self._manager.options.deadline)
        return PartWriter(self, self._manager, attempt)

    def publish(self) -> Root:
        """Make the checkpoint appear, then apply the retention policy; only on the coordinator."""
        attempt, part, expected = self._begun()
        try:
            root = publish(attempt, part, expected, _join)
        finally:
            forget(self._under_way, attempt.id)
        self._manager.retire()
        if self._told:
            with contextlib.suppress(S3LoaderError):  # garbage collection deletes it, too
                self._manager.store.delete(self._told)
        return root

    def _begun(self) -> tuple[Attempt, Part, Root]:
        if self._attempt is None or self._expected is None or self._part is None:
            raise CheckpointError(
                "nothing was begun here", url=self._manager.store.url, hint="prepare_global_plan and write_data come first"
            )
        return self._attempt, self._part, self._expected

    def close(self) -> None:
        """Let go of the store."""
        if self._attempt is not None:
            forget(self._under_way, self._attempt.id)
        self._manager.close()

    def __del__(self) -> None:  # a save that failed elsewhere
        if self._attempt is not None:
            forget(self._under_way, self._attempt.id)


class PartWriter:
    """Collects and uploads what one rank saves."""

    def __init__(self, writing: Writing, manager: CheckpointManager, attempt: Attempt) -> None:
        self._writing, self._manager, self._attempt = writing, manager, attempt
        self._pieces: list[SavedPiece] = []
        self._flat: dict[str, dict[str, Any]] = {}

    def add_box(
        self, fqn: str, path: Sequence[str | int], source: Source, shape: tuple[int, ...], offset: tuple[int, ...]
    ) -> None:
        """Save a box of the tensor `fqn`, which is of `shape` as a whole."""
        name = _name(path)
        self._flat[fqn] = {"path": list(path), "node": {"$": "leaf", "of": source.kind}}
        for piece in source.pieces:
            self._pieces.append(SavedPiece(name, source.dtype, shape, piece._replace(offset=offset)))

    def add_value(self, fqn: str, path: Sequence[str | int], value: Any) -> None:
        """Save what is no tensor.

        Raises:
            UnsupportedStateError: it is neither JSON nor made of arrays.
        """

        def add(name: str, adapter: LeafAdapter, leaf: Any, per_rank: bool) -> None:
            source = adapter.source(leaf)
            self._pieces.extend(SavedPiece(name, source.dtype, source.shape, piece) for piece in source.pieces)

        node = tree.encode(value, add, name=_name(path))
        if _is(node, "leaf"):  # no tensor to DCP: it comes back as the value that it is
            node = {**node, "value": True}
        self._flat[fqn] = {"path": list(path), "node": node}

    def give_up(self, error: Exception) -> None:
        """Tell the other ranks that this one cannot finish its part, so that none waits for its deadline."""
        with contextlib.suppress(S3LoaderError):  # the error itself is what must be seen
            tell_failure(self._attempt, f"{type(error).__name__}: {error}")

    def upload(self) -> dict[str, int]:
        """Upload everything and this rank's part manifest; returns the bytes of each tensor by its FQN."""
        attempt, options = self._attempt, self._manager.options
        files = plan_files(
            self._pieces,
            attempt.rank,
            options.file_size,
            options.block,
            attempt.about,
            hashed=options.incremental,
            part_of=part_size_of(options, attempt.run.store),
        )
        if options.resume_uploads and attempt.step in attempt.session.record.unfinished:
            take_over(attempt, files, self._manager.pool, options.concurrency)
        plan = SavePlan({"$": "dcp", "of": self._flat}, files, sum(p.end - p.begin for p in self._pieces), {}, {}, [], None)
        saver = Saver(attempt, plan, self._manager.pool, options, on_exists="error", after=None, publishes=False)
        try:
            saver.stage()
            saver.handle.result()
        except BaseException:
            forget(under_way(self._manager.store.url), attempt.id)
            raise
        self._writing._part = saver.part
        names = {_name(told["path"]): fqn for fqn, told in self._flat.items()}
        sizes: dict[str, int] = {}
        for piece in self._pieces:
            fqn = names.get(piece.name, piece.name)
            sizes[fqn] = sizes.get(fqn, 0) + piece.end - piece.begin
        return sizes


def _name(path: Sequence[str | int]) -> str:
    name = ""
    for key in path:
        name = tree.child_name(name, key)
    return name


@dataclass(slots=True)
class _Branch:
    children: dict[str | int, Any] = field(default_factory=dict)


def _join(trees: list[Any]) -> Any:
    """One tree of the ranks' flat ones."""
    flat: dict[str, dict[str, Any]] = {}
    for each in trees:
        flat.update(each["of"])
    top = _Branch()
    for fqn, told in flat.items():
        branch = top
        *way, last = told["path"]
        for key in way:
            inner = branch.children.setdefault(key, _Branch())
            if not isinstance(inner, _Branch):
                raise CheckpointError(
                    f"{fqn!r} lies inside {key!r}, which is a value",
                    hint="ranks disagree on the structure of the state dict; save the same on each",
                )
            branch = inner
        branch.children[last] = told["node"]
    return _node(top)


def _node(branch: Any) -> Any:
    if not isinstance(branch, _Branch):
        return branch
    inside = {key: _node(child) for key, child in branch.children.items()}
    if all(isinstance(key, str) for key in inside):
        return {"$": "dict", "of": inside}
    if any(isinstance(key, str) for key in inside) or set(inside) != set(range(len(inside))):
        raise CheckpointError(
            f"a list has the places {sorted(map(str, inside))}",
            hint="ranks disagree on the length of a list in the state dict; save the same structure on each",
        )
    return [inside[i] for i in range(len(inside))]


class FlatEntry(NamedTuple):
    """One entry of a state dict as DCP flattens it."""

    fqn: str
    path: tuple[str | int, ...]
    name: str
    is_tensor: bool
    value: Any


def flat_entries(checkpoint: Checkpoint, tensor: Callable[[str], Any]) -> list[FlatEntry]:
    """A checkpoint's items as DCP flattens a state dict: mappings are opened, and lists that hold mappings or tensors;
    everything else is one entry.

    Args:
        checkpoint: Which.
        tensor: Reads a tensor that lies inside a value (a tuple of tensors), by its name.

    Raises:
        CheckpointError: two entries have one name in DCP, which knows keys as text only.
    """
    entries: list[FlatEntry] = []
    _flatten(checkpoint.tree, (), "", entries, tensor)
    names: dict[str, str] = {}
    for entry in entries:
        other = names.setdefault(entry.fqn, entry.name)
        if other != entry.name:
            raise CheckpointError(
                f"{other!r} and {entry.name!r} are both {entry.fqn!r} to torch.distributed.checkpoint",
                hint="restore it with a CheckpointManager, which tells them apart",
            )
    return entries


def _flatten(node: Any, path: tuple[str | int, ...], name: str, entries: list[FlatEntry], tensor: Callable[[str], Any]) -> None:
    fqn = ".".join(map(str, path))
    if _is_tensor(node):
        entries.append(FlatEntry(fqn, path, name, True, None))
    elif _is_mapping(node) or (isinstance(node, list) and _opens(node)):
        for key, inner, child in tree.children(node, name):
            _flatten(child, (*path, key if isinstance(node, list) else str(key)), inner, entries, tensor)
    else:
        entries.append(FlatEntry(fqn, path, name, False, tree.decode(node, tensor, name)))


def _is_tensor(node: Any) -> bool:
    return _is(node, "leaf") and node.get("of") not in _VALUES and not node.get("value")


_VALUES = (BYTES.kind, "numpy.scalar")
"""Kinds that are values to DCP, whoever has saved them."""


def _is(node: Any, *tags: str) -> bool:
    return isinstance(node, Mapping) and node.get("$") in tags


def _is_mapping(node: Any) -> bool:
    return _is(node, "dict", "odict", "counter")


def _opens(node: list[Any]) -> bool:
    return any(_is_mapping(item) or _is_tensor(item) or (isinstance(item, list) and _opens(item)) for item in node)
