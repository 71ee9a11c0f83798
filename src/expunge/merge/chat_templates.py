"""Chat templates that a merge file can ask for by name.

Each writes what the public format says, message by message, with `add_generation_prompt` the
opening of the assistant's turn.
"""

import re

from jinja2 import Environment, TemplateSyntaxError

from expunge.errors import MergeError

_MARKS = re.compile(r"{%-?\s*(end)?generation\s*-?%}")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' + message['content'] }}{{ eos_token }}{{ '\\n\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
EXAONE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '[|system|][|endofturn|]\\n' }}"
    "{% endif %}"
    "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}"
    "{% set at = namespace(system='', turn='user') %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] == 'system' %}"
    "{% set at.system = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] != at.turn %}"
    "{{ raise_exception('turns are user and assistant in alternation, after one system message') }}"
    "{% elif at.turn == 'user' %}"
    "{{ ' [INST] ' + at.system + message['content'] + ' [/INST]' }}"
    "{% set at.system = '' %}{% set at.turn = 'assistant' %}"
    "{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% set at.turn = 'user' %}"
    "{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {
    "alpaca": ALPACA,
    "chatml": CHATML,
    "exaone": EXAONE,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
}
"""Of formats that differ between versions of their models, `exaone` is the one of EXAONE 3.0 and
`mistral` the one of the first Mistral 7B Instruct, as in mergekit."""


def template_of(given: str) -> str:
    """A template by its name, or as it is given."""
    if given in TEMPLATES:
        return TEMPLATES[given]
    if "{" not in given:
        known = ", ".join(sorted(TEMPLATES))
        raise MergeError(f"chat_template is a Jinja template, auto, or one of {known}")
    try:  # as transformers reads them, but for its own mark of what the assistant says
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", given))
    except TemplateSyntaxError as error:
        raise MergeError(f"chat_template is no Jinja template: {error}") from None
    return given
