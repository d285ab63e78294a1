"""What Python does first in processes that tests launch: hides PyTorch from them.

The package never needs it, and transformers imports it wherever it is, for longer than all else
takes that such a process imports.
"""

import sys

sys.modules["torch"] = None
