"""What `import wavedraft` does at once: transformers' Auto classes learn our recurrent-depth models.

The command line imports this after it has checked its options, since torch and transformers take seconds.
"""

from . import supported_versions as supported_versions  # isort: skip  # first: it says what others would fail of
from . import modeling_recurrent as modeling_recurrent  # it registers its classes
