"""The transformers backend: models in this process, with KV caches that roll back by lane."""

import logging

# transformers imports torchao where that is installed. torchao then notes which kernels for other devices it
# cannot load: nobody at the terminal needs to know.
_before = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    import transformers.modeling_utils  # noqa: F401
finally:
    logging.disable(_before)
