"""Adaptors of fairseq's own criterions, registered by importing this package."""

from deltasam_plugin.adaptors import sentences, speech, tokens  # noqa: F401
