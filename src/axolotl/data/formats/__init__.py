"""Dataset formats: what a row of a dataset says, as a typed value.

A format is one decorated function in one file. Built-in ones stand in this folder; a user's own is named by dotted path
in `type:`, or registered by a plugin with `register_format`.
"""

from axolotl.data.formats.fields import check_fields
from axolotl.data.formats.registry import Convert, Format, formats, register_format
from axolotl.data.formats.resolve import check_type, resolve_format

__all__ = ["Convert", "Format", "check_fields", "check_type", "formats", "register_format", "resolve_format"]
