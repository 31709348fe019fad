"""Parses the words of this program as vLLM's server does: `python -m tests.pipeline.serve_words --max-logprobs 64`."""

from __future__ import annotations

from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    validate_parsed_serve_args(make_arg_parser(FlexibleArgumentParser()).parse_args())
