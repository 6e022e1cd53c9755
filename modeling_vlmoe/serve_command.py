"""`vlmoe serve`: `transformers serve`, in a process that knows this architecture. The server is the host's."""

import sys
from typing import Any

import typer


def pack_experts_too(manager_class: Any) -> None:
    """Lets the host's `--quantization bnb-4bit` and `bnb-8bit` reach experts, which bitsandbytes leaves out."""
    of_linears = manager_class.get_quantization_config

    def get_quantization_config(self: Any) -> Any:
        from modeling_vlmoe.quantization import VLMoEQuantizationConfig

        given = of_linears(self)
        if given is None:
            return None
        bits = 4 if given.load_in_4bit else 8
        return VLMoEQuantizationConfig(bits, bnb_4bit_use_double_quant=given.bnb_4bit_use_double_quant)

    manager_class.get_quantization_config = get_quantization_config


def run_serve(context: typer.Context) -> None:
    """Serve a model over an OpenAI-compatible API: `transformers serve`, which this command hands its words to.

    For example: vlmoe serve tuned/merged --port 8000. All of its options: transformers serve --help. Then:
    vlmoe chat tuned/merged http://localhost:8000/v1, or any client of that API.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError("A server needs fastapi, uvicorn and openai. Install them: pip install 'vlmoe[serve]'.")
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.transformers import app

    from modeling_vlmoe.servers import register_with_servers

    register_with_servers()
    pack_experts_too(ModelManager)
    sys.exit(app(["serve", *context.args], prog_name="vlmoe", standalone_mode=True))
