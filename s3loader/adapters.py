"""What integrations and foreign adapter authors may use of the core, beside the names of `s3loader` itself.

An adapter imports from here and from ``s3loader``, nothing else. What is not listed may move or change in any release; what is
listed keeps its name and its meaning for as long as `ADAPTER_API` does not change:

- a name that is added leaves the number as it is;
- a name that goes, or means something else, raises it by one, and the changelog says what to write instead.

Names are loaded from their modules on first use, so an adapter for loaders imports nothing of checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from s3loader.arguments import checked as checked
    from s3loader.arguments import unknown_option as unknown_option
    from s3loader.checkpoint import load as load
    from s3loader.checkpoint import save as save
    from s3loader.checkpoint.dcp import FlatEntry as FlatEntry
    from s3loader.checkpoint.dcp import PartWriter as PartWriter
    from s3loader.checkpoint.dcp import Ticket as Ticket
    from s3loader.checkpoint.dcp import Writing as Writing
    from s3loader.checkpoint.dcp import flat_entries as flat_entries
    from s3loader.checkpoint.dcp import known_url as known_url
    from s3loader.checkpoint.error_context import with_error_context as with_error_context
    from s3loader.checkpoint.format.records import box_of as box_of
    from s3loader.checkpoint.protocol.session import Identity as Identity
    from s3loader.checkpoint.rendezvous import Box as Box
    from s3loader.checkpoint.state.leaves import LARGE as LARGE
    from s3loader.checkpoint.state.leaves import NUMPY as NUMPY
    from s3loader.checkpoint.state.leaves import Device as Device
    from s3loader.checkpoint.state.leaves import Framework as Framework
    from s3loader.checkpoint.state.leaves import LeafAdapter as LeafAdapter
    from s3loader.checkpoint.state.leaves import Opened as Opened
    from s3loader.checkpoint.state.leaves import Piece as Piece
    from s3loader.checkpoint.state.leaves import Source as Source
    from s3loader.checkpoint.state.leaves import SpreadAdapter as SpreadAdapter
    from s3loader.checkpoint.state.leaves import Target as Target
    from s3loader.checkpoint.state.leaves import WithState as WithState
    from s3loader.checkpoint.state.leaves import adapter_for as adapter_for
    from s3loader.checkpoint.state.leaves import adapter_of_kind as adapter_of_kind
    from s3loader.checkpoint.state.leaves import fresh_memory as fresh_memory
    from s3loader.checkpoint.state.leaves import overlaps as overlaps
    from s3loader.checkpoint.state.opening import loading as loading
    from s3loader.checkpoint.state.opening import with_fields as with_fields
    from s3loader.checkpoint.state.opening import with_variables as with_variables
    from s3loader.checkpoint.state.tree import leaf_names as leaf_names
    from s3loader.dtypes import DTYPES as DTYPES
    from s3loader.dtypes import nbytes as nbytes
    from s3loader.dtypes import numpy_dtype as numpy_dtype
    from s3loader.dtypes import numpy_name as numpy_name
    from s3loader.loader import AdapterKeywords as AdapterKeywords
    from s3loader.loader import DatasetSource as DatasetSource
    from s3loader.loader import FromSources as FromSources
    from s3loader.loader import LoaderKeywords as LoaderKeywords
    from s3loader.loader import MemberKeywords as MemberKeywords
    from s3loader.loader import SourceKeywords as SourceKeywords
    from s3loader.loader import open_source as open_source
    from s3loader.loader.collate import columns as columns
    from s3loader.loader.collate import make_collate as make_collate
    from s3loader.loader.collate import map_leaves as map_leaves
    from s3loader.loader.collate import ragged as ragged
    from s3loader.loader.collate import stacked as stacked
    from s3loader.loader.sample_stage import batch_error as batch_error
    from s3loader.loader.sample_stage import refuse_all_skipped as refuse_all_skipped
    from s3loader.packing.part import archive_of as archive_of
    from s3loader.packing.part import drop_tries as drop_tries
    from s3loader.packing.part import entries_of as entries_of
    from s3loader.packing.part import write_part as write_part
    from s3loader.packing.sources import as_sample as as_sample
    from s3loader.plan import PlanState as PlanState
    from s3loader.plan import Schedule as Schedule
    from s3loader.plan import Tail as Tail
    from s3loader.plan import Topology as Topology
    from s3loader.plan.schedule import Cursor as Cursor
    from s3loader.plan.schedule import OnBreak as OnBreak
    from s3loader.plan.schedule import checked_epoch as checked_epoch
    from s3loader.progress import Report as Report
    from s3loader.progress import ShowProgress as ShowProgress
    from s3loader.progress import check_progress as check_progress
    from s3loader.progress import showing as showing
    from s3loader.ranks import find_ranks as find_ranks
    from s3loader.store.open import StoreKeywords as StoreKeywords
    from s3loader.units import parse_size as parse_size

ADAPTER_API: Final = 1
"""The version of this list."""

NAMES: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Arguments and processes": {
        "checked": (
            "s3loader.arguments",
            "Decorator: arguments are held against their annotations; a wrong one is a `ConfigError`.",
        ),
        "unknown_option": (
            "s3loader.arguments",
            "The `ConfigError` for keywords that are not known, which names the nearest known one.",
        ),
        "find_ranks": (
            "s3loader.ranks",
            "Rank and world size of this process, from the framework in use or the launcher's variables.",
        ),
        "ShowProgress": ("s3loader.progress", "What `progress=` may be: True, a function, or nothing."),
        "Report": ("s3loader.progress", "A function of how many are done, of how many, and bytes."),
        "check_progress": ("s3loader.progress", "Raises where a `ShowProgress` is none."),
        "showing": ("s3loader.progress", "Context manager: the `Report` of a `ShowProgress`; None where nobody wants to know."),
    },
    "Where samples come from": {
        "DatasetSource": (
            "s3loader.loader",
            "The first argument of a dataset class: an open `Dataset`, a URL, or a function that opens one.",
        ),
        "FromSources": (
            "s3loader.loader",
            "Base class with the constructors `from_manifest`, `from_webdataset`, `from_tfrecord`, `from_mds` ...",
        ),
        "open_source": ("s3loader.loader", "Opens a `DatasetSource`, and gives back the options that were not for opening it."),
        "AdapterKeywords": ("s3loader.loader", "TypedDict: all options that the datasets of every framework take."),
        "MemberKeywords": ("s3loader.loader", "TypedDict: these options, without those of Parquet files."),
        "SourceKeywords": ("s3loader.loader", "TypedDict: the options of opening a dataset."),
        "LoaderKeywords": ("s3loader.loader", "TypedDict: the options of `LoaderOptions`."),
        "StoreKeywords": ("s3loader.store.open", "TypedDict: the options of `open_store`."),
    },
    "Which batch comes next": {
        "Topology": ("s3loader.plan", "Rank, world size, worker and number of workers."),
        "Schedule": ("s3loader.plan", "Which positions of an epoch a step of a rank takes."),
        "Tail": ("s3loader.plan", "What happens to the samples that do not fill a batch on every rank."),
        "PlanState": ("s3loader.plan", "The state of a loader: plan digest, epoch, consumed positions."),
        "Cursor": (
            "s3loader.plan.schedule",
            "Epoch and consumed positions, as they move with iterations, saves and `set_epoch`.",
        ),
        "OnBreak": ("s3loader.plan.schedule", "Where the next iteration begins after one that was broken off."),
        "checked_epoch": ("s3loader.plan.schedule", "An epoch number that a state can hold, or a `ConfigError`."),
        "batch_error": (
            "s3loader.loader.sample_stage",
            "The error of a batch that cannot be converted, with its samples named.",
        ),
        "refuse_all_skipped": ("s3loader.loader.sample_stage", 'Raises where `on_error="skip"` has left nothing of an epoch.'),
    },
    "What a batch is made of": {
        "make_collate": ("s3loader.loader.collate", "The function of a `Collate` option; None where samples stay a list."),
        "columns": ("s3loader.loader.collate", "A list of equal structures as one structure of columns."),
        "stacked": ("s3loader.loader.collate", "One column as an array with the batch as its first dimension."),
        "ragged": ("s3loader.loader.collate", "One column of arrays of different lengths as a `Ragged`."),
        "map_leaves": (
            "s3loader.loader.collate",
            "A function applied to every leaf of lists, tuples and mappings, which keep their types.",
        ),
    },
    "Datasets that a cluster writes": {
        "as_sample": ("s3loader.packing.sources", "A mapping, or a pair of key and mapping, as the sample that is written."),
        "write_part": (
            "s3loader.packing.part",
            "Writes one part of a dataset: shards, and a manifest that is put create-only.",
        ),
        "entries_of": ("s3loader.packing.part", "The entries of one manifest."),
        "archive_of": ("s3loader.packing.part", "Key of the shard that an entry names."),
        "drop_tries": ("s3loader.packing.part", "Deletes shards of tries that were killed, or came second."),
        "parse_size": ("s3loader.units", "Bytes of a size such as ``64MiB``."),
    },
    "Leaves of a checkpoint: how a framework's arrays and objects are saved and restored": {
        "Framework": (
            "s3loader.checkpoint.state.leaves",
            "Protocol of ``FRAMEWORK`` in ``s3loader_NAME.checkpoint_state``: what the core asks of an integration.",
        ),
        "LeafAdapter": ("s3loader.checkpoint.state.leaves", "Protocol: how one kind of array gives and takes its bytes."),
        "SpreadAdapter": (
            "s3loader.checkpoint.state.leaves",
            "Protocol: a `LeafAdapter` of arrays that are spread over processes.",
        ),
        "Device": ("s3loader.checkpoint.state.leaves", "Protocol: how bytes are copied out of a device's memory."),
        "Piece": ("s3loader.checkpoint.state.leaves", "A box of an array that this process holds, and its bytes."),
        "Source": ("s3loader.checkpoint.state.leaves", "An array to be saved: kind, dtype, shape and pieces."),
        "Target": ("s3loader.checkpoint.state.leaves", "Memory that an array is restored into."),
        "Opened": ("s3loader.checkpoint.state.leaves", "A container of a framework's registry, one level deep."),
        "WithState": ("s3loader.checkpoint.state.leaves", "An object that gives and takes its state."),
        "NUMPY": (
            "s3loader.checkpoint.state.leaves",
            "The `LeafAdapter` of `numpy.ndarray`, for frameworks whose arrays become one.",
        ),
        "adapter_for": ("s3loader.checkpoint.state.leaves", "The `LeafAdapter` of a value; None where it is no leaf."),
        "adapter_of_kind": ("s3loader.checkpoint.state.leaves", "The `LeafAdapter` that saved leaves of a kind."),
        "overlaps": ("s3loader.checkpoint.state.leaves", "Whether elements of a strided array may share memory."),
        "with_variables": (
            "s3loader.checkpoint.state.opening",
            "A `WithState` of an object that is restored by assigning to its variables.",
        ),
        "with_fields": ("s3loader.checkpoint.state.opening", "A dataclass like another one, with other values in some fields."),
        "loading": (
            "s3loader.checkpoint.state.opening",
            "Context manager: what an object raises while it takes a state carries its name in the checkpoint.",
        ),
        "LARGE": ("s3loader.checkpoint.state.leaves", "Bytes from which `fresh_memory` pays."),
        "fresh_memory": ("s3loader.checkpoint.state.leaves", "New writable memory, on huge pages where the system has them."),
        "DTYPES": (
            "s3loader.dtypes",
            "Element types of checkpoints: safetensors name -> bytes of an element, numpy name.",
        ),
        "nbytes": ("s3loader.dtypes", "Bytes of a dense array of a dtype and shape."),
        "numpy_dtype": ("s3loader.dtypes", "The numpy type of a safetensors name."),
        "numpy_name": (
            "s3loader.dtypes",
            "The safetensors name of a numpy type's name; None where there is none.",
        ),
    },
    "Saves that a framework coordinates": {
        "save": ("s3loader.checkpoint", "Saves one state under a URL of its own."),
        "load": ("s3loader.checkpoint", "Restores what `save` has written."),
        "known_url": ("s3loader.checkpoint.dcp", "Whether `open_store` takes a URL."),
        "Writing": (
            "s3loader.checkpoint.dcp",
            "One save of several ranks that the framework's coordinator begins and publishes.",
        ),
        "Ticket": ("s3loader.checkpoint.dcp", "What a rank must know to take part in a `Writing`; pickles."),
        "PartWriter": ("s3loader.checkpoint.dcp", "Collects and uploads what one rank saves."),
        "FlatEntry": ("s3loader.checkpoint.dcp", "One entry of a checkpoint as torch's DCP flattens a state dict."),
        "flat_entries": ("s3loader.checkpoint.dcp", "All entries of a checkpoint, flattened so."),
        "Identity": ("s3loader.checkpoint.protocol.session", "Which rank of which job this process is."),
        "Box": ("s3loader.checkpoint.rendezvous", "A box of a tensor that a rank could save, with its size in bytes."),
        "box_of": ("s3loader.checkpoint.format.records", "Offset and shape of a stored chunk's box."),
        "leaf_names": ("s3loader.checkpoint.state.tree", "Name and kind of every leaf of a stored tree."),
        "with_error_context": (
            "s3loader.checkpoint.error_context",
            "Decorator: errors of a method carry the operation and the URL of its object.",
        ),
    },
}
"""Group -> name -> the module it is loaded from, and what it is."""

_HOME: Final = {name: home for group in NAMES.values() for name, (home, _) in group.items()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 's3loader.adapters' has no attribute {name!r}; what adapters may use is in NAMES")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
