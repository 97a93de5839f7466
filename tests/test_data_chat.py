"""Templates render as transformers renders them, and hostile ones stop."""

import json
import threading
import time

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from jaxtune.data import chat
from jaxtune.data.chat import TEMPLATES, render, render_folded
from jaxtune.errors import DataError, UserError

USER, ANSWER = {"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Hello! "}
SYSTEM = {"role": "system", "content": "Be brief."}

# The chat template in the tokenizer_config.json of meta-llama/Llama-2-7b-chat-hf.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def write(template, messages, prompt=False, bos="<bos>", eos="<eos>"):
    return render(template, messages, add_generation_prompt=prompt, bos_token=bos, eos_token=eos)


def by_transformers(template, messages, prompt):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<bos>": 0, "<eos>": 1, "?": 2}, unk_token="?"))
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    return hf.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)


@pytest.fixture(scope="module")
def real(shared):
    """The real templates by the goldens' names, with their BOS and EOS."""
    folder = shared / "tokenizers"

    def read(name):
        return json.loads((folder / name).read_text())["chat_template"]

    return {
        "gemma1_2": (read("gemma/gemma2_it_tokenizer_config.json"), "<bos>", "<eos>"),
        "gemma3": (read("gemma/gemma3_it_chat_template.json"), "<bos>", "<eos>"),
        "gemma_chatml": (read("gemma/gemma_chatml_template.json"), "<bos>", "<eos>"),
        "tinyllama_zephyr": (read("llama2/tinyllama_chat_tokenizer_config.json"), "<s>", "</s>"),
    }


def test_goldens(shared, real):
    """The real templates and our named ones give the published text, and refuse what the real ones refuse."""
    ours = {
        "gemma1_2": (TEMPLATES["gemma"], "<bos>", "<eos>"),
        "gemma_chatml": (TEMPLATES["chatml"], "<bos>", "<eos>"),
    }
    seen = 0
    for line in (shared / "tokenizers/goldens/chat_template_goldens.jsonl").read_text().splitlines():
        golden = json.loads(line)
        for name, expected in golden["rendered"].items():
            for template, bos, eos in [real[name], *([ours[name]] if name in ours else [])]:
                arguments = (template, golden["messages"], golden["add_generation_prompt"], bos, eos)
                if isinstance(expected, str):
                    assert write(*arguments) == expected
                else:
                    with pytest.raises(DataError, match=expected["error"].split("/")[0]):
                        write(*arguments)
                seen += 1
    assert seen == 72


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [USER, ANSWER],
        [USER, ANSWER, USER, ANSWER],
        [SYSTEM, USER, ANSWER, USER],
        [{"role": "system", "content": "  padded "}, USER, ANSWER],
    ],
)
def test_llama2_equals_the_real_template(messages, prompt):
    assert write(TEMPLATES["llama2"], messages, prompt) == by_transformers(LLAMA2, messages, prompt)


def test_what_templates_use_is_there():
    """Filters, loop controls, `generation`, macros, namespaces and unescaped JSON as in transformers."""
    template = """
    {%- macro show(m) %}{{ m.role | upper }}: {{ m['content'] | trim | tojson }}{% endmacro %}
    {%- set ns = namespace(n=0) %}
    {%- for m in messages %}
        {%- if m.role == 'system' %}{% continue %}{% endif %}
        {%- set ns.n = ns.n + 1 %}
        {% generation %}{{ show(m) ~ ' ' ~ ns.n }}{% endgeneration %}
    {%- endfor %}
    {%- if tools is none and date is not defined %}{{ ' ' * 3 + {'a': '<é>', 'b': [1]} | tojson(indent=1) }}{% endif %}
    {{ '%s-%5.1f' | format('a', 2.5) }}{{ '{:>4}|{}'.format('b', 'c') }}{{ 'n=%d' % 7 }}
    {{ 'x'.join(['1', '2']) if not add_generation_prompt else range(3) | list }}{{ messages[-1].content.split('l')[0] }}
    """
    for prompt in (False, True):
        messages = [SYSTEM, USER, ANSWER]
        assert write(template, messages, prompt) == by_transformers(template, messages, prompt)
    assert write("{{ strftime_now is defined }}", [USER]) == "False"  # today's date would change the data overnight


def test_system_is_folded_only_where_it_is_refused(real):
    options = {"add_generation_prompt": True, "bos_token": "<bos>", "eos_token": "<eos>"}
    for messages in ([SYSTEM, USER], [SYSTEM, USER, ANSWER, USER]):
        gemma3 = write(real["gemma3"][0], messages, prompt=True)
        for gemma in (TEMPLATES["gemma"], real["gemma1_2"][0]):
            text, folded = render_folded(gemma, messages, **options)
            assert text == gemma3
            assert folded[0] == {"role": "user", "content": "Be brief.\n\nHi"} and folded[1:] == messages[2:]
        for name in ("chatml", "llama2"):
            text, untouched = render_folded(TEMPLATES[name], messages, **options)
            assert untouched == messages and text == write(TEMPLATES[name], messages, prompt=True)


def test_folding_hides_no_other_refusal():
    options = {"add_generation_prompt": False, "bos_token": "", "eos_token": ""}
    for messages in ([SYSTEM, ANSWER], [SYSTEM, USER, USER], [USER, USER], [SYSTEM]):
        with pytest.raises(DataError, match="refuses this conversation"):
            render_folded(TEMPLATES["gemma"], messages, **options)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{{ environment.tick() }}",
    ],
)
def test_nothing_escapes_the_sandbox(template):
    try:
        text = write(template, [USER])
    except UserError:  # DataError is one: what the sandbox hides is undefined.
        return
    assert "class" not in text and "uid=" not in text and text.strip() in ("", "None")
    assert template != "{{ messages.append(1) }}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
        "{% set r = range(99999) | list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(9) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ ['a'] * 10000000 }}",
        "{{ 9**9**9 }}",
        "{{ 'a'.center(10**10) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a' | indent(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '%*d' % (1000, 1) }}",
        "{{ '{:>1000000000}'.format('x') }}",
        "{{ '{:>{}}'.format('x', '1000000000') }}",
        "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 30,
        "{% set x = 'ab' %}" + "{% set x = x + x %}" * 30,
        "{% for i in range(99999) %}{{ 'x' * 200 }}{% endfor %}",
        "{% for i in range(10000) %}" + "x" * 1000 + "{% endfor %}",
        "{{ lipsum(1000) }}{{ lipsum() }}",
        "x" * 10_000_000,
        "{% if %}",
        "{{ unclosed",
        "{{ 1 | nosuchfilter }}",
        "(" * 5000,
        "{{ " + "(" * 5000 + " }}",
    ],
)
def test_limits_stop_hostile_templates(template):
    """Bounded in time and output, in worker threads too."""
    outcome = []

    def work():
        try:
            outcome.append(write(template, [USER]))
        except UserError as error:
            outcome.append(error)

    started = time.monotonic()
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(timeout=60)
    assert not worker.is_alive() and time.monotonic() - started < 30
    if template == "(" * 5000:
        assert outcome == [template]  # Text, and short enough.
    else:
        assert isinstance(outcome[0], UserError), str(outcome[0])[:100]
        assert len(str(outcome[0])) < 1000


def test_a_template_at_fault_is_not_the_rows_fault():
    with pytest.raises(UserError) as at_fault:
        write("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", [USER])
    assert not isinstance(at_fault.value, DataError) and f"{chat.MAX_SECONDS:g} s" in str(at_fault.value)
    with pytest.raises(DataError, match="cannot render"):
        write("{{ messages[7].content.strip() }}", [USER])


def test_the_clock_starts_anew_for_each_row():
    """Renderings that together take longer than one may; a collection of garbage in one of them takes less."""
    started = time.thread_time()
    while time.thread_time() < started + 1.5 * chat.MAX_SECONDS:
        assert write("{% for i in range(500) %}{% endfor %}ok", [USER]) == "ok"
