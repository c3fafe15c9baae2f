"""What an optimizer does to one element, and which optimizer does it.

The rules that this package has are registered here, with the first import of any module.
"""

from . import builtin as builtin
