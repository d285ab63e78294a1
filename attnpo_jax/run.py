"""A run: a config resolved, once; and `attnpo run`, its stages in turn.

A config says what is wanted; a `Run` says what that comes to. Every stage takes one, and what is
below the stages takes plain values.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax import registry
from attnpo_jax.data import column_sets, mixture, vocabulary
from attnpo_jax.data.cache_key import naming_fields
from attnpo_jax.data.columns import Columns
from attnpo_jax.data.prepared import METADATA, Prepared
from attnpo_jax.data.prompts import Prompt
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge.prompt import JudgeTemplate
from attnpo_jax.models import int8, lora
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.io import hf_folder
from attnpo_jax.models.io.model_source import ModelSource
from attnpo_jax.parallel import processes
from attnpo_jax.runtime import history, lock, metrics, paths, schema
from attnpo_jax.runtime.errors import UsageError
from attnpo_jax.weighting import Source

if TYPE_CHECKING:
    from rich.console import Console

    from attnpo_jax.prepare import readers


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What a config comes to; made by `resolve`.

    Whatever costs a download, a read or a digest is resolved when a stage first asks for it, and
    kept: mistakes in the data are found before a model is fetched, and nothing is resolved twice.

    Attributes:
      config: the config, checked.
      workdir: the run's folder; None for commands that write nothing.
      template: the judge's prompt template.
    """

    config: config_dict.ConfigDict
    workdir: pathlib.Path | None
    template: JudgeTemplate
    _loaded: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
    _held: set[pathlib.Path] = dataclasses.field(default_factory=set, repr=False)  # folders

    @classmethod
    def resolve(
        cls, config: config_dict.ConfigDict, workdir: str | os.PathLike | None = None
    ) -> "Run":
        """Checks a config, and what it names that is cheap to look at.

        Args:
          config: see `attnpo_jax.config.default_config`.
          workdir: the run's folder. None for what writes nothing: then the model's weights are not
            fetched either.

        Raises:
          ConfigError: lists all that is wrong; nothing was loaded.
          UserError: the judge's template lacks a slot.
          ProcessesError: of several processes, some have another workdir than the rest.
        """
        config_lib.validate(config)
        config_lib.complete_sections(config)
        template = JudgeTemplate.load(config.judge.template)
        if workdir is not None:
            workdir = paths.followed(workdir)
            processes.check_shared(workdir, "workdir")
        return cls(config, workdir, template)

    @classmethod
    def of_workdir(cls, workdir: str | os.PathLike, *, run_plugins: bool = False) -> "Run":
        """The run of a folder, as its config.json has it.

        Args:
          run_plugins: whether the Python files that it names in `plugins` are run: in workdirs of
            others, programs of others. Those that this process has run already are not asked about.

        Raises:
          UsageError: there is no config.json, or it names plugins that are not to be run.
          ConfigError: it is none that a run writes.
        """
        folder = pathlib.Path(workdir).expanduser()
        file = folder / "config.json"
        if not file.is_file():
            raise UsageError(f"{folder}: no config.json there; accepted: the workdir of a run")
        config = config_lib.load_file(str(file))
        named = filter(None, config_lib.as_tuple(config.plugins))
        new = [str(one) for one in named if not registry.has_loaded(str(one))]
        if new and not run_plugins:
            raise UsageError(
                f"{file}: plugins = {', '.join(new)}, Python files, which would be run as you; "
                "accepted: --run-plugins (in Python run_plugins=True), if you trust them"
            )
        return cls.resolve(config, folder)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the workdir, and a folder of checkpoints elsewhere, for this run alone.

        Whatever writes there does so inside of a `with run.writing()`; one inside of another has
        it already. Several processes enter together, and share it. A bucket has no lock.

        Raises:
          LockedError: another run, which lives, has it.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.alone_in(self.workdir))
            if "://" not in (self.config.train.checkpoint_dir or "://"):
                stack.enter_context(self.alone_in(self.checkpoint_folder))
            yield

    def preparing(self) -> contextlib.AbstractContextManager[None]:
        """Holds `prepared/` for this run alone where it is a link: other workdirs may share it.

        Several processes enter together. Raises as `writing` does.
        """
        folder = self.workdir / "prepared"
        return self.alone_in(folder) if folder.is_symlink() else contextlib.nullcontext()

    @contextlib.contextmanager
    def alone_in(self, folder: os.PathLike) -> Iterator[None]:
        """Holds a folder's lock, unless an outer block of this run does."""
        folder = pathlib.Path(os.path.realpath(folder))
        if folder in self._held:
            yield
            return
        everyone = processes.exchange(lock.this_process(), lock.PROCESS)
        with lock.held(folder, everyone) if processes.is_first() else contextlib.nullcontext():
            processes.barrier("a folder is locked")
            self._held.add(folder)
            try:
                yield
            finally:
                self._held.discard(folder)
            processes.barrier("a folder is released")

    def recorded(self, stage: str, **about: Any) -> contextlib.AbstractContextManager[None]:
        """Has the workdir's history tell of a block's work: what it is, on what, how it ended."""
        if self.workdir is None or not processes.is_first():
            return contextlib.nullcontext()
        from attnpo_jax.parallel import machine  # which JAX is needed for

        return history.recorded(self.workdir, stage, about | machine.facts())

    # --- The data ---------------------------------------------------------------------------------

    @property
    def splits(self) -> tuple[str, ...]:
        """`train`, and `eval` if there are held-out pairs."""
        return ("train", "eval") if mixture.parse(self.config.data.eval) else ("train",)

    @property
    def columns(self) -> Columns:
        """How the columns of examples are read."""
        return config_lib.columns(self.config)

    @property
    def weight_columns(self) -> str | tuple[str, ...]:
        """The precomputed weights to read: "all", or their names."""
        return config_lib.weight_columns(self.config)

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        """The columns of judge and reference that training reads, by `data.shards.GROUPS`."""
        return config_lib.reads(self.config)

    def held_out_prompts(self, most: int | None = None) -> list[Prompt]:
        """The prompts of the held-out pairs, the first of them where there are to be no more."""
        data = self.config.data
        pairs = load_pairs(
            data.eval,
            on_bad_row=data.on_bad_row,
            columns=self.columns,
            max_example_bytes=data.max_example_bytes,
        ).pairs
        return [Prompt(pair.id, pair.prompt, pair.tools) for pair in pairs[:most]]

    def prepared_path(self, split: str) -> pathlib.Path:
        """The folder of a split's prepared dataset."""
        return paths.followed(self.workdir / "prepared") / split

    @functools.cached_property
    def checkpoint_folder(self) -> Any:
        """Where the checkpoints are: a path of this machine, or of a bucket."""
        from etils import epath

        named = self.config.train.checkpoint_dir
        if named and "://" not in named:
            processes.check_shared(epath.Path(named), "config.train.checkpoint_dir")
        return epath.Path(named) if named else epath.Path(self.workdir) / "checkpoints"

    def checkpoint_step(self, asked: str | int | None) -> int | None:
        """The step of the checkpoint that is asked for. All processes must ask together.

        Args:
          asked: a step, as a number or a text; `best` for the best evaluation by
            `config.train.keep_best`; `newest`. None: the best, where that field names a metric and
            there is one, else the newest.

        Returns:
          A step that has a checkpoint; None for the newest.

        Raises:
          UserError: there is no such checkpoint, or no way to tell the best.
        """
        if asked == "newest" or (asked is None and not self.config.train.keep_best):
            return None
        folder = self.checkpoint_folder  # all processes look whether it is theirs
        step = None
        if processes.is_first():
            from attnpo_jax.parallel import checkpoint_choice

            keep_best = self.config.train.keep_best
            step = checkpoint_choice.saved_step(folder, self.workdir, keep_best, asked)
        return processes.exchange(step, schema.Maybe(schema.Whole()))[0]

    # --- The model --------------------------------------------------------------------------------

    @functools.cached_property
    def model_folder(self) -> pathlib.Path:
        """The HF folder of the model that training starts from; fetched if need be."""
        return hf_folder.resolve(self.config.model.source, weights=self.workdir is not None)

    @functools.cached_property
    def model(self) -> ModelConfig:
        """That model's shape."""
        return hf_folder.load_config(self.model_folder)

    @functools.cached_property
    def policy(self) -> ModelConfig:
        """The shape of what is trained: the model's, with adapters if the config wants them."""
        return lora.adapted(self.model, self.config.lora)

    @functools.cached_property
    def passes(self) -> ModelConfig:
        """The shape of what judges and scores: the model's, or its int8 form."""
        return int8.shape_of_passes(self.model, self.config.model.prepare_weights)

    @functools.cached_property
    def reference(self) -> ModelSource | None:
        """The reference; None for the model that training starts from."""
        source = self.config.reference.source
        if source in ("", self.config.model.source):
            return None
        return ModelSource(source, "reference.source", self.workdir is not None)

    @functools.cached_property
    def judge(self) -> "readers.Reader | None":
        """The judge; None for the model that training starts from."""
        from attnpo_jax.prepare import readers

        return readers.judge(self)

    @functools.cached_property
    def scorers(self) -> "dict[str, readers.NamedScorer]":
        """The scorers by name."""
        from attnpo_jax.prepare import readers

        return readers.scorers(self)

    @functools.cached_property
    def source_layers(self) -> tuple[Source, ...]:
        """The layers, heads and rollout whose attention is kept, checked against the judge."""
        shape = self.model if self.judge is None else self.judge.shape
        return config_lib.check_layers(
            self.config, shape.num_layers, shape.layer_windows, shape.num_heads
        )

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The text of the file that `model.chat_template` names; None for the tokenizer's own."""
        file = self.config.model.chat_template
        return None if file is None else pathlib.Path(file).read_text(encoding="utf-8")

    @functools.cached_property
    def tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer, with the chat template in use."""
        variables = self.config.model.chat_template_kwargs
        return ChatTokenizer.load(self.model_folder, self.chat_template, variables)

    @functools.cached_property
    def weights_digest(self) -> str:
        """sha256 of the model's weights, as they are stored."""
        return hf_folder.weights_digest(self.model_folder)

    @functools.cached_property
    def tokenizer_digest(self) -> str:
        """sha256 of the tokenizer and its chat template."""
        return self.tokenizer.digest()

    @property
    def adapters_identity(self) -> dict[str, Any]:
        """What a checkpoint's adapters must share with the config.

        Without the base that they were trained on, and the scale that they were trained with,
        adapters are worth nothing: neither shows in their shapes.
        """
        fields = {f"lora.{name}": self.config.lora[name] for name in ("rank", "alpha", "targets")}
        return {"config": fields, "prepared": {"model": {"weights": self.weights_digest}}}

    def load_params(
        self,
        shape: ModelConfig,
        shardings: Any,
        *,
        keep: bool = False,
        of: ModelSource | None = None,
    ) -> Any:
        """A model's parameters, in `model.param_dtype`; read once for stages in one process.

        Args:
          shape: `model` or `passes`, or those of another model.
          shardings: where they lie, as `Backend.parameter_shardings` says.
          keep: whether the next stage may have these very arrays. Who leaves it False may donate
            them.
          of: the model; None for the one that training starts from.
        """
        import jax
        import jax.numpy as jnp

        folder = self.model_folder if of is None else of.folder
        key = folder, of and of.adapter, shape, tuple(jax.tree.leaves(shardings))
        params = self._loaded.get(key)
        self._loaded.clear()  # never two sets of parameters at a time
        if params is None:
            params = hf_folder.load_params(
                folder,
                shape,
                param_dtype=jnp.dtype(self.config.model.param_dtype),
                shardings=shardings,
                adapter=None if of is None else of.read_adapter,
            )
        if keep:
            self._loaded[key] = params
        return params

    def drop_params(self) -> None:
        """Forgets parameters that were kept."""
        self._loaded.clear()

    # --- What was prepared ------------------------------------------------------------------------

    def wanted(
        self,
        split: str,
        pairs_digest: str | None,
        weight_columns: Sequence[str] = (),
        reads: Sequence[str] | None = None,
    ) -> column_sets.Wanted:
        """All that the run reads of a split; see `prepare.wanted`."""
        from attnpo_jax.prepare.wanted import wanted

        return wanted(self, split, pairs_digest, weight_columns, reads)

    def open_prepared(self, split: str, reads: Sequence[str] | None = None) -> Prepared:
        """A split's prepared dataset, if it is what this run would prepare.

        The pairs are not read again: of the data, only the names of the sources are compared.

        Args:
          split: `train` or `eval`.
          reads: of `data.shards.GROUPS`, what rows are to have; None for what training reads.

        Raises:
          FileNotFoundError: there is none, or it is not finished, or lacks what is read.
          PreparedMismatch: it was prepared with other settings.
          ConfigError: it lacks the column that `weighting.column` names.
          UserError: a token is beyond the model's vocabulary.
          DamagedShard: a shard is not what was written.
        """
        path = self.prepared_path(split)
        if not (path / METADATA).is_file():
            raise FileNotFoundError(
                f"{path}: not prepared, or not to the end; run `attnpo prepare` with this config "
                "and workdir first"
            )
        dataset = Prepared.open(path)
        columns = dataset.weight_columns if self.weight_columns == "all" else self.weight_columns
        with naming_fields(split):
            dataset = column_sets.joined(dataset, self.wanted(split, None, columns, reads))
        config_lib.check_columns(self.config, dataset.columns)
        vocabulary.check_rows(self.tokenizer, self.model.vocab_size, dataset, str(path))
        return dataset


def run(run: Run, *, step: str | int | None = None, console: "Console | None" = None) -> None:
    """Does everything that a config asks for; what an earlier run has finished is not done again.

    Args:
      run: the run.
      step: the checkpoint that is evaluated and exported, see `Run.checkpoint_step`.
      console: where figures and folders go; None for standard output.
    """
    # Here, so that a command loads its own stage alone.
    from rich.console import Console

    from attnpo_jax import evaluate, export, prepare, report, train
    from attnpo_jax.evaluate.files import FOLDER
    from attnpo_jax.evaluate.stage import wanted
    from attnpo_jax.export.stage import export_folders
    from attnpo_jax.generate import model as models
    from attnpo_jax.runtime.printable import say
    from attnpo_jax.train.stage import refuse_changed

    console = console or Console()
    with run.writing():
        refuse_changed(run)
        for name in wanted(run):
            evaluate.find(name)  # before anything is computed
        prepare.prepare(run, keep_params=True, console=console)
        train.train(run, console=console)
        if wanted(run):
            which = models.TRAINED if step is None else f"{models.TRAINED}@{step}"
            evaluate.evaluate(run, model=which, console=console)
        export.export(run, step=step, console=console)
        page = report.at_end(run) if processes.is_first() else None
    if not processes.is_first():
        return
    names = {"model": "model (Hugging Face)", "adapter": "adapters (PEFT)"}
    for what, path in (
        *((("report", page),) if page else ()),
        *((names[kind], folder) for kind, folder in export_folders(run).items()),
        *((("evaluations", run.workdir / FOLDER),) if wanted(run) else ()),
        ("metrics", run.workdir / metrics.FILE),
        ("checkpoints", run.checkpoint_folder),
        ("prepared data", run.workdir / "prepared"),
        ("config", run.workdir / "config.json"),
    ):
        say(console, f"{what:<21} {path}")
