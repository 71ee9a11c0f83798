"""Chat templates that a merge file can ask for by name, and those that it must give itself.

Each writes what the public format says, message by message, with `add_generation_prompt` the
opening of the assistant's turn.
"""

from expunge.errors import MergeError

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
TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "llama3": LLAMA3}
_SEVERAL = ("exaone", "mistral")
"""Names that mergekit has too, of formats that differ between versions of their models."""


def template_of(given: str) -> str:
    """A template by its name, or as it is given."""
    if given in TEMPLATES:
        return TEMPLATES[given]
    known = ", ".join(sorted(TEMPLATES))
    if given in _SEVERAL:
        raise MergeError(
            f"chat_template: {given} has several formats, one for each version of its models; "
            f"give the Jinja template itself, or one of {known}"
        )
    if "{" not in given:
        raise MergeError(f"chat_template is a Jinja template, auto, or one of {known}")
    return given
