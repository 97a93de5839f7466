"""A model for EleutherAI's evaluation harness (`pip install 'jaxtune[eval]'`), which brings the tasks:

  python -m jaxtune.lm_eval run --model jaxtune --model_args model=DIR,adapter=DIR --tasks hellaswag --batch_size 16

The command registers the model and is `lm_eval` otherwise.  Requests with the same context share its prefill; batches
hold contexts of similar length, over all devices.  Numbers equal those of the harness's own `hf` model.
"""

import sys
from typing import Any

import jax

from jaxtune import mesh as meshes
from jaxtune import trained
from jaxtune.cli import last_words
from jaxtune.config import get_default, set_value
from jaxtune.data.chat import render_folded
from jaxtune.errors import UserError
from jaxtune.generate import Sampling
from jaxtune.likelihood import continuations
from jaxtune.measure import BATCH, batched
from jaxtune.models import decoder_start
from jaxtune.tokenizer import load_tokenizer

try:
    from lm_eval import utils as windows  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    said = f"The evaluation harness is not installed ({error}). Install it with pip install 'jaxtune[eval]'."
    if __name__ == "__main__":
        sys.exit(last_words(f"error: {said}", UserError.exit_code))
    raise ModuleNotFoundError(said) from error

# What tasks call the number of new tokens, the first that is there; the harness's own order and default.
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_NEW_TOKENS = 256
DEFAULT_LENGTH = 2048  # of a model whose config.json names none


@register_model("jaxtune")
class JaxtuneLM(TemplateLM):
    """The arguments are `--model_args`.

    Args:
      model: a directory or Hub id.  adapter: a PEFT directory over it.  dtype: of weights and activations.
      quant: nf4 | int8; None: as the adapter was trained.  double_quant: NF4's scales in 8 bits.
      batch_size: contexts side by side.  max_length: tokens that a text may have; None: what the model is made for.
      others: what the harness passes to every model and is of no use here.

    Raises:
      UserError: and its kinds: no such model, or one that needs more than a text (tasks of a multitask prompt).
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        dtype: str = "float32",
        quant: str | None = None,
        double_quant: bool = False,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if wrong := sorted(others.keys() - {"device", "max_batch_size"}):
            raise UserError(
                f"--model_args has {wrong[0]!r}. It can have: model, adapter, dtype, quant, double_quant, "
                "batch_size, max_length."
            )
        if not str(batch_size or BATCH).isdecimal():
            raise UserError(f"--batch_size is {batch_size!r}. It is a number of rows; there is no automatic one.")
        c = get_default()
        values = {"id": str(model), "dtype": dtype, "quant": quant, "double_quant": double_quant}
        for key, value in values.items():
            set_value(c, f"model.{key}", value)
        found = trained.bare(str(model), c)
        if adapter is not None:
            where = trained.path_of(adapter)
            trained.held_as_trained(c, where, print)
            found = trained.over(str(adapter), c, where, print)
        if found.virtual.tasks > 1:
            raise UserError(f"{adapter} has {found.virtual.tasks} tasks, and the harness's rows name none.")
        self.name, self.before = str(model), found.virtual.ids().tolist()
        self.mesh = trained.mesh_of(c, print)
        with jax.set_mesh(self.mesh):
            self.variables = found.variables(self.mesh, trained.one_at_a_time(self.mesh))
        self.model, self.tokenizer = found.base.model, load_tokenizer(found.base.directory)
        self.backend = "causal" if decoder_start(found.base.hf_config) is None else "seq2seq"
        text = found.base.hf_config.get("text_config", found.base.hf_config)
        self.max_length = int(max_length or text.get("max_position_embeddings") or DEFAULT_LENGTH)
        shards = meshes.batch_shards(self.mesh)
        self.how: dict[str, Any] = {"batch_size": int(batch_size or BATCH), "shards": shards}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Ids of a text, as the checkpoint's tokenizer gives them to a model: BOS before a decoder's, EOS behind an
        encoder's."""
        ids = self.tokenizer.encode(string)
        if add_special_tokens is False:
            return ids
        if self.backend == "seq2seq":
            return [*ids, self.tokenizer.eos_id]
        bos = self.tokenizer.bos_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _loglikelihood_tokens(self, requests: Any, **others: Any) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of each request's continuation; too long a context loses its beginning."""
        of_context: dict[tuple[int, ...], list[int]] = {}
        texts = []
        for number, (_, context, text) in enumerate(requests):
            room = self.max_length if self.backend == "seq2seq" else self.max_length + 1 - len(text)
            of_context.setdefault((*self.before, *context[-max(room, 1) :]), []).append(number)
            texts.append(text)
        groups = [[texts[number] for number in numbers] for numbers in of_context.values()]
        with jax.set_mesh(self.mesh):
            scores = continuations(self.model, self.variables, list(of_context), groups, **self.how)
        found = {}
        for numbers, group in zip(of_context.values(), scores, strict=True):
            found |= {number: (score.logprob, score.greedy) for number, score in zip(numbers, group, strict=True)}
        return [found[number] for number in range(len(texts))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of what the model is made for."""
        parts: list[Any] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            how = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
            for window in windows.get_rolling_token_windows(self.tok_encode(request.args[0]), **how):
                parts.append((None, *windows.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            totals[number] += logprob
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first of the request's stop strings, which is cut off."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        found: dict[int, str] = {}
        for numbers in groups.values():
            texts = self._answers([requests[n].args[0] for n in numbers], requests[numbers[0]].args[1])
            found |= zip(numbers, texts, strict=True)
        return [found[number] for number in range(len(requests))]

    def _answers(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        new = next((int(settings[key]) for key in NEW_TOKENS if settings.get(key) is not None), DEFAULT_NEW_TOKENS)
        room = self.max_length - (new if self.backend == "causal" else 0)
        if room < 1:
            raise UserError(f"A task asks for {new} new tokens; this model takes texts of {self.max_length}.")
        ids = [[*self.before, *self.tok_encode(context)[-room:]] for context in contexts]
        sampling = None
        if settings.get("do_sample") or (settings.get("do_sample") is None and settings.get("temperature")):
            sampling = Sampling(settings.get("temperature") or 1.0, settings.get("top_k"), settings.get("top_p"))
        # A stop string that is one token ends the generation; others, and those inside a token, are found afterwards.
        single = [tokens[0] for text in until if len(tokens := self.tokenizer.encode(text)) == 1]
        stop = dict.fromkeys([*self.tokenizer.stop_ids, *single])
        with jax.set_mesh(self.mesh):
            how = {"max_new_tokens": new, "stop_ids": tuple(stop), "sampling": sampling, **self.how}
            texts = [self.tokenizer.decode(out) for out in batched(self.model, self.variables, ids, **how)]
        for text in filter(None, until):
            texts = [answer.split(text)[0] for answer in texts]
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as one text; without a generation prompt it ends inside the last turn, which goes on."""
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.name} has no chat template. Leave --apply_chat_template out.")
        tokens = {"bos_token": self.tokenizer.bos_token, "eos_token": self.tokenizer.eos_token}
        how = {"add_generation_prompt": add_generation_prompt, **tokens}
        text, _ = render_folded(self.tokenizer.chat_template, chat_history, **how)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]


def main() -> None:
    """The harness's own command line, with this model in its list."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(last_words(f"error: {error}", error.exit_code))


if __name__ == "__main__":
    main()
