"""Chat templates: a conversation in, the text a model is trained on out.

A checkpoint's template is a program written by a stranger.  It runs in Jinja's immutable sandbox, and because that
bounds neither time nor memory (its documentation says so), under limits of our own.

Source of the environment: transformers, `utils/chat_template_utils.py`.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxtune.errors import DataError, UserError

# One turn: {"role": "system" | "user" | "assistant", "content": text}.
Message = dict[str, str]

MAX_TEMPLATE_CHARS = 128 * 1024
# What a template may write beyond the conversation itself, which may be long.
MAX_OUTPUT_CHARS = 1024 * 1024
# Of the processor.  A collection of garbage falls into it, which in a process with many programs takes a second.
MAX_SECONDS = 3.0
MAX_NUMBER = 10_000

# The named templates, for checkpoints that have none or not the wanted one.
TEMPLATES = {
    # Gemma 1 and 2.  They refuse a system turn; `render_folded` puts it into the first user turn.
    "gemma": """\
{{ bos_token }}
{%- if messages and messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) }}
    {{- '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    # ChatML as HuggingFaceH4/zephyr-7b-gemma-v0.1 has it: an answer that ends the conversation is followed by EOS.
    "chatml": """\
{{ bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- elif messages and messages[-1].role == 'assistant' %}{{ eos_token }}{% endif %}""",
    # Llama 2 chat: a system turn is part of the first user turn.
    "llama2": """\
{%- set system = messages[0].content if messages and messages[0].role == 'system' else none %}
{%- for message in (messages if system is none else messages[1:]) %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'assistant' %}{{ ' ' + message.content | trim + ' ' + eos_token }}
    {%- elif loop.first and system is not none %}
        {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message.content %}
        {{- bos_token + '[INST] ' + content | trim + ' [/INST]' }}
    {%- else %}{{ bos_token + '[INST] ' + message.content | trim + ' [/INST]' }}{% endif %}
{%- endfor %}""",
    # Llama 3's.  Those of 3.1 and later write a system turn with dates besides: theirs come with the checkpoint.
    "llama3": """{{ bos_token if messages else '' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
}


def render(
    template: str, messages: Sequence[Message], *, add_generation_prompt: bool, bos_token: str, eos_token: str
) -> str:
    """The text of a conversation, as transformers' `apply_chat_template(tokenize=False)` writes it.

    Raises:
      DataError: the template refuses or cannot render this conversation.
      UserError: the template itself is at fault (syntax, forbidden access, too slow, too much output).
    """
    pieces, size = [], 0
    _limits.deadline = time.thread_time() + MAX_SECONDS
    _limits.output = MAX_OUTPUT_CHARS + 4 * sum(len(message["content"]) for message in messages)
    try:
        for piece in _compile(template).generate(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
        ):
            _tick()
            pieces.append(piece)
            size = _within(size + len(piece))
    except _RefusedError as error:
        raise DataError(f"The chat template refuses this conversation: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"The chat template is not valid Jinja (line {error.lineno}): {error.message}") from None
    except (SecurityError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(
            f"The chat template does what templates may not: {error or type(error).__name__} "
            f"Set `data.chat_template` to use one of ours: {', '.join(TEMPLATES)}."
        ) from None
    except UserError:
        raise
    except Exception as error:  # The template met a message it was not written for, e.g. an undefined field.
        raise DataError(f"The chat template cannot render this conversation: {error}") from None
    return "".join(pieces)


def render_folded(
    template: str, messages: Sequence[Message], *, add_generation_prompt: bool, bos_token: str, eos_token: str
) -> tuple[str, list[Message]]:
    """`render`, and the messages as the template took them.

    A template that refuses a leading system turn (Gemma 1 and 2) gets it inside the first user turn, the way Gemma 3's
    own template does it: system + blank line + user.

    Raises:
      DataError, UserError: as `render`.
    """
    options = {"add_generation_prompt": add_generation_prompt, "bos_token": bos_token, "eos_token": eos_token}
    try:
        return render(template, messages, **options), list(messages)
    except DataError:
        if [message["role"] for message in messages[:2]] != ["system", "user"]:
            raise
    system, user, *rest = messages
    folded = [{"role": "user", "content": system["content"] + "\n\n" + user["content"].strip()}, *rest]
    return render(template, folded, **options), folded


# --- the limits ---


class _RefusedError(Exception):
    """What a template's own `raise_exception` raises."""


# Of the render that this thread is in: `deadline` in CPU seconds, `output` in characters.
_limits = threading.local()


def _tick() -> None:
    # CPU time of this thread, so that a busy machine does not make a good template too slow.
    if time.thread_time() > _limits.deadline:
        raise SecurityError(f"it took more than {MAX_SECONDS:g} s.")


def _within(size: int) -> int:
    if size > _limits.output:
        raise SecurityError(f"it writes more than {_limits.output} characters.")
    return size


def _small(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise SecurityError(f"it passes the number {str(value)[:20]}; {MAX_NUMBER} is the most.")


def _joined(*parts: Any) -> str:
    text = [str(part) for part in parts]
    _within(sum(map(len, text)))
    return "".join(text)


def _binary(operator: str, left: Any, right: Any) -> Any:
    if operator == "+":
        if hasattr(left, "__len__") and hasattr(right, "__len__"):
            _within(len(left) + len(right))
        return left + right
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if hasattr(sequence, "__len__") and isinstance(times, int):
                _within(len(sequence) * max(times, 0))
        if isinstance(left, int) and isinstance(right, int):
            _within(left.bit_length() + right.bit_length())
        return left * right
    if operator == "**":
        _small((left, right))
        return left**right
    if isinstance(left, str):
        _narrow(left)
    return left % right


def _narrow(form: str) -> None:
    """Refuses a format string that asks for a great width, or takes the width from elsewhere."""
    if re.search(r"\d{5}|%[^%a-z]*\*|:[^{}]*\{", form):
        raise SecurityError("it formats with a great width.")


def _guard(function: Any) -> Any:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if function.__name__ == "do_format":
            _narrow(str(args[0]))
        _small((*args[1:], *kwargs.values()))
        return function(*args, **kwargs)

    return guarded


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said; we find it without, so it is plain text here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    """The template with a look at the clock at the head of every loop and macro body.

    Two nested `{% for %}` over Jinja's largest range run for hours and write nothing, so watching the output is not
    enough.  A signal would stop them in the main thread only, and `sys.settrace` costs every row; the clock call is
    compiled in, works in every thread, and templates cannot name it.  Calls, filters, operators and `~` are watched for
    sizes in the same way.  What remains is one expression whose result is its arguments' product (`replace`, `join`).
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise SecurityError(f"it is {len(template)} characters long; {MAX_TEMPLATE_CHARS} is the most.")
    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        optimized=False,  # Nothing is computed while compiling.
    )

    def raise_exception(message: str) -> None:
        raise _RefusedError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def call(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _tick()
        if function is not environment.globals["range"]:  # It has its own limit.
            _small((*args, *kwargs.values()))
        result = sandboxed_call(context, function, *args, **kwargs)
        if isinstance(result, str):
            _within(len(result))
        return result

    def wrap_str_format(value: Any) -> Any:
        wrapped = sandboxed_format(value)
        if wrapped is not None:
            _narrow(value.__self__)
        return wrapped

    sandboxed_call, sandboxed_format = environment.call, environment.wrap_str_format
    environment.wrap_str_format = wrap_str_format
    environment.call = call
    environment.intercepted_binops = frozenset(("+", "*", "**", "%"))
    environment.call_binop = lambda context, operator, left, right: _binary(operator, left, right)
    environment.tick, environment.joined = _tick, _joined
    environment.filters = {name: _guard(f) for name, f in environment.filters.items()} | {"tojson": _guard(tojson)}
    environment.globals["raise_exception"] = raise_exception
    # No `strftime_now`: the same rows must give the same tokens tomorrow.  Templates that know it (Llama 3.2) ask
    # whether it is defined and else write a date of their own.
    del environment.globals["lipsum"]

    def watch(name: str, arguments: list, line: int) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=line)

    tree = environment.parse(template)
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        node.body.insert(0, nodes.ExprStmt(watch("tick", [], node.lineno), lineno=node.lineno))
    for node in list(tree.find_all(nodes.Concat)):
        node.nodes = [watch("joined", node.nodes, node.lineno)]
    tree.set_environment(environment)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
