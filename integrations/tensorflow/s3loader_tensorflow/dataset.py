"""`make_tf_dataset` and `S3TFLoader`: a `tf.data.Dataset` fed by the loader, one Python call a batch, static specs."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Unpack

import tensorflow as tf

from s3loader import Batch, ConfigError, Loader, LoaderStats, PlanError
from s3loader.adapters import AdapterKeywords, DatasetSource, FromSources, checked, make_collate, open_source
from s3loader_tensorflow.specs import collate_tensors, held, spec_of, to_tensorflow

__all__ = ["S3TFLoader", "make_tf_dataset"]


@checked
class S3TFLoader(FromSources):
    """Makes `tf.data.Dataset`s of one exactly resumable order, and knows its state.

    tf.data prefetches, so only the training loop knows how many batches were trained on. It tells `state_dict`
    (``fit`` does it through `S3StateCallback`). The order is that of the torch and JAX adapters, sample for sample.

    Args:
        source: A dataset (`s3loader.loader`), or the URL of a manifest, prefix, shard or WebDataset pattern.
        batch_size: Samples per batch and rank.
        output_signature: Specs of a batch; None reads one sample and derives them. Every value comes as it is, or is an error:
            of another kind or shape, or a number that the dtype does not hold. (Floats are rounded to fewer bits where you give
            the specs.) With ``collate="ragged"`` arrays derived are `tf.RaggedTensorSpec`s.
        rank: This process among those that train together.
        world_size: How many there are.
        options: Everything else of `s3loader.LoaderOptions`. Here `on_break` is ``"again"`` unless given, and without `collate`
            arrays and numbers are stacked as by ``"fixed"``, bytes and strings are `tf.string`s. With a URL also those
            of `s3loader.open_dataset` and `open_store`.

    Raises:
        ConfigError: an option is unusable, or TensorFlow has no type for a batch.
    """

    def __init__(
        self,
        source: DatasetSource,
        *,
        batch_size: int,
        output_signature: Any = None,
        rank: int = 0,
        world_size: int = 1,
        **options: Unpack[AdapterKeywords],
    ) -> None:
        dataset, rest = open_source(source, options)
        given = rest.get("collate")
        self._make_batch = make_collate(given) or collate_tensors
        self._ragged = given == "ragged"
        rest["collate"] = self._collate
        rest.setdefault("on_break", "again")  # Keras looks at one batch before it trains on any
        self.loader = Loader(dataset, batch_size=batch_size, rank=rank, world_size=world_size, **rest)
        self._signature = output_signature
        self._chosen = output_signature is not None
        self._complete = 0
        """How many of `_given` belong to passes that came to their end."""
        self._given: list[_Handed] = []
        """The batches handed to tf.data since the state began."""
        self.batches_per_pass: int | None = None
        """How many `dataset` told tf.data last; None if it told none."""
        self._base = self._position()

    def _position(self) -> tuple[int, int]:
        state = self.loader.state_dict()
        return state["epoch"], state["consumed"]

    @property
    def stats(self) -> LoaderStats:
        """What was read, and who waited for whom."""
        return self.loader.stats

    @property
    def element_spec(self) -> Any:
        """Static specs of a batch; the batch axis is fixed where `tail` is ``"drop"`` or ``"pad"``."""
        if self._signature is None:
            options = self.loader.options
            rows = None if options.tail == "short" or options.on_error == "skip" else options.batch_size
            self._signature = spec_of(self._one_sample(), rows, ragged=self._ragged)
        return self._signature

    def _one_sample(self) -> Any:
        """A batch of one sample, made as all others are."""
        options = self.loader.options
        probe = Loader(
            self.loader.dataset, batch_size=1, decode=options.decode, transform=options.transform,
            collate=options.collate, on_error=options.on_error, shuffle="none", prefetch="1MiB", allow_empty=True,
        )  # fmt: skip
        batches = probe.iter_batches()
        first = next(batches, None)
        batches.close()
        if first is None:
            raise ConfigError("the dataset is empty, so its specs cannot be read off it", hint="give output_signature=")
        return first.data

    def _collate(self, samples: list[Any]) -> Any:
        """A batch as tf.data takes it, held against the specs once they are known: in the loader, so that an error comes with
        the place of its sample."""
        made = to_tensorflow(self._make_batch(samples))
        return made if self._signature is None else held(made, self._signature, rounding=self._chosen)

    def dataset(self, *, known_length: bool = True) -> tf.data.Dataset:
        """A dataset of batches. Each pass over it is one epoch, and the next pass (or ``repeat``) is the next epoch.

        Args:
            known_length: Tell TensorFlow how many batches a pass has, as ``fit`` wants it. The rest of a resumed epoch is
                shorter than the epochs after it, so then the dataset serves one pass; make the next one after it.
                False: any number of passes of unknown length.
        """
        self.batches_per_pass = length = len(self.loader) if known_length else None
        partial = bool(self.loader.state_dict()["consumed"]) and length is not None
        passes = iter([True]) if partial else None

        def batches() -> Iterator[Any]:
            if passes is not None and not next(passes, False):
                raise PlanError(
                    "this dataset was the rest of a resumed epoch, and that is over",
                    hint="call dataset() again for the next epoch, or make it with known_length=False",
                )
            return self._batches()

        made = tf.data.Dataset.from_generator(batches, output_signature=self.element_spec)
        if length is not None:
            made = made.apply(tf.data.experimental.assert_cardinality(length))
        return made.prefetch(tf.data.AUTOTUNE)

    def _batches(self) -> Iterator[Any]:
        # A pass that was dropped half-way counts for nothing: Keras looks at one batch before it trains on any.
        mine = self._given = self._given[: self._complete]
        for batch, last in _with_end(self.loader.iter_batches()):
            mine.append(_Handed(batch.epoch, batch.consumed, len(batch.samples)))
            if last and mine is self._given:
                self._complete = len(mine)
            yield batch.data

    def __len__(self) -> int:
        """Batches in the next pass."""
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.loader.set_epoch(epoch)
        self._given, self._complete, self._base = [], 0, self._position()

    def handed_out(self, *, whole_passes: bool = False) -> tuple[int, int]:
        """Batches and samples that tf.data has got since this loader was made, loaded or given an epoch.

        Args:
            whole_passes: Only those of passes that came to their end.
        """
        handed = self._given[: self._complete] if whole_passes else self._given
        return len(handed), sum(batch.samples for batch in handed)

    def state_dict(self, batches: int | None = None, *, samples: int | None = None) -> dict[str, Any]:
        """Where the sequence stands after so many batches, counted since this loader was made, loaded or given an epoch.

        Args:
            batches: Batches as this loader makes them.
            samples: Samples in place of batches, where ``unbatch().batch()`` or the like made others of them. What
                is left out on the way (``filter``, ``on_error="skip"``) counts as used.

        Raises:
            PlanError: so many were never handed out; or `samples` end inside of a batch, of which there is no state.
            ConfigError: not one of the two is given.
        """
        if (batches is None) == (samples is None):
            raise ConfigError("a state is that after a number of batches, or of samples", hint="give one of the two")
        if batches is None:
            batches = self._batches_of(samples or 0)
        if not 0 <= batches <= len(self._given):
            raise PlanError(f"{batches} batches were not handed out; {len(self._given)} were")
        epoch, consumed = self._given[batches - 1][:2] if batches else self._base
        return self.loader.plan.state(epoch, consumed).as_dict()

    def _batches_of(self, samples: int) -> int:
        ends = list(itertools.accumulate((handed.samples for handed in self._given), initial=0))
        batches = bisect.bisect_left(ends, samples)
        if samples < 0 or batches == len(ends):
            raise PlanError(f"{samples} samples were not handed out; {ends[-1]} were")
        if ends[batches] != samples:
            raise PlanError(
                f"{samples} samples end inside of a batch of the loader, of which there is no state",
                hint="choose a batch_size= for the loader that divides the batches you train with",
            )
        return batches

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changed: bool = False) -> None:
        """Go on from `state` in the next pass; make the dataset (`dataset`) after this.

        Raises:
            StateMismatchError: the state belongs to other data, seed or options.
        """
        self.loader.load_state_dict(state, allow_changed=allow_changed)
        self._given, self._complete, self._base = [], 0, self._position()


class _Handed(NamedTuple):
    """A batch given to tf.data."""

    epoch: int
    consumed: int
    """Positions of the epoch, behind it."""
    samples: int


def _with_end(batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last. Looks one batch ahead: who knows the length never asks for what comes after
    the last batch, and with it the pass must be over. An error still comes in its place."""
    batch = next(batches, None)
    while batch is not None:
        failure: Exception | None = None
        coming: Batch | None = None
        try:
            coming = next(batches, None)
        except Exception as error:  # noqa: BLE001 - raised below, after the batch before it
            failure = error
        yield batch, coming is None and failure is None
        if failure is not None:
            raise failure
        batch = coming


class _Options(AdapterKeywords, total=False):
    output_signature: Any
    rank: int
    world_size: int


@checked
def make_tf_dataset(
    source: DatasetSource, *, batch_size: int = 1, map_fn: Any = None, **options: Unpack[_Options]
) -> tf.data.Dataset:
    """A `tf.data.Dataset` of batches in a shuffled, verified order. Takes the options of `S3TFLoader`, which also resumes.

    Args:
        source: As for `S3TFLoader`.
        batch_size: Samples per batch and rank.
        map_fn: Applied with ``Dataset.map(map_fn, num_parallel_calls=AUTOTUNE)``.
        options: As for `S3TFLoader`.
    """
    made = S3TFLoader(source, batch_size=batch_size, **options).dataset()
    return made if map_fn is None else made.map(map_fn, num_parallel_calls=tf.data.AUTOTUNE)
