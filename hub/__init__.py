"""What travels with a checkpoint, and how it is published."""

from .hub_repository import HubRepository
from .written_files import WrittenFiles

HubRepository.files = WrittenFiles()  # a checkpoint's copy of HubRepository, which this file does not reach, copies
