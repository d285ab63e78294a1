"""What Python does first in processes that tests launch: hides PyTorch from them.

The package never needs it, and transformers imports it wherever it is, for longer than all else
takes that such a process imports.
"""

import os
import sys

sys.modules["torch"] = None
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # as `attnpo` has it
