"""Recovery: what a start of the store makes of the files that the last process left.

    full copy, delta, delta    applied one after another; the last one's digests have to hold
    a damaged one              set aside with all that build on it; what comes before serves

No version is served whose digests were not verified.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from learner.weights.disk import WeightDisk
from learner.weights.head import Head
from learner.weights.link_file import slice_bodies
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.links import Link
from understudy.weights.manifest import check_slices, check_values

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What the store begins with."""

    disk: WeightDisk
    links: Sequence[Link] = ()
    """A full copy and the deltas that follow it, or nothing."""
    head: Head | None = None
    """The version that they lead to."""

    @property
    def is_newest(self) -> bool:
        """Whether there is a version and no newer one can have been lost. Replicas may have had
        that one, and episodes ask for it: the trainer is to publish again."""
        return self.head is not None and not self.disk.lost_any


def recover(disk: WeightDisk, issued: Sequence[int] | None) -> Recovered:
    """Read the newest version that is whole, and remove files that lead to no version any more.

    Args:
        disk: the folder, open.
        issued: steps behind each version that the run's log issued, from version 1 on; None if that
            is not known here.
    """
    links = [link for link in disk.read_links() if _was_issued(disk, link, issued)]
    result = Recovered(disk=disk)
    for full in sorted((link for link in links if not link.base_version), key=_version)[::-1]:
        result = _restore(disk, _newest_chain(full, links))
        if result.links:
            break
    disk.remove(link for link in links if link not in result.links)
    if result.head:
        _log.info("weights of version %d are back", result.head.version)
    return result


def _version(link: Link) -> int:
    return link.version


def _was_issued(disk: WeightDisk, link: Link, issued: Sequence[int] | None) -> bool:
    """Whether the run's log knows of a link's version; one that it does not is set aside."""
    if issued is None:
        return True
    steps = issued[link.version - 1] if 0 < link.version <= len(issued) else None
    if steps != link.manifest.step:
        disk.set_aside(link, f"the run's log has no version {link.version} of its step")
    return steps == link.manifest.step


def _newest_chain(full: Link, links: Sequence[Link]) -> list[Link]:
    """A full copy and the deltas from it to the newest version that they lead to."""
    deltas = {link.version: link for link in links if link.base_version}
    for newest in sorted(deltas, reverse=True):
        chain, version = [], newest
        while version > full.version and version in deltas:
            chain.append(deltas[version])
            version = deltas[version].base_version
        if version == full.version:
            return [full, *reversed(chain)]
    return [full]


def _restore(disk: WeightDisk, chain: Sequence[Link]) -> Recovered:
    """Apply a chain, or as much of it as is sound."""
    try:
        return Recovered(disk=disk, links=chain, head=_replay(chain))
    except WeightsRefusedError:
        chain = _sound_part(disk, chain)
    if not chain:
        return Recovered(disk=disk)
    return Recovered(disk=disk, links=chain, head=_replay(chain))


def _replay(chain: Sequence[Link]) -> Head:
    """The version that a chain leads to.

    Raises:
        WeightsRefusedError: it is damaged somewhere.
    """
    head = None
    for link in chain:
        head = _take(head, link)
    assert head
    check_values(head.manifest.slices, head.buffer, finite=False)
    return head


def _take(head: Head | None, link: Link) -> Head:
    known, based = head.layout if head else None, bool(link.base_version)
    layout = check_slices(link.manifest.slices, known, based=based)
    head = head or Head(layout)
    head.apply(link.manifest, slice_bodies(link))
    return head


def _sound_part(disk: WeightDisk, chain: Sequence[Link]) -> Sequence[Link]:
    """The links before the first damaged one. It and those that build on it are set aside."""
    head = None
    for index, link in enumerate(chain):
        try:
            head = _take(head, link)
            check_values(link.manifest.slices, head.buffer, finite=False)
        except WeightsRefusedError as error:
            disk.set_aside(link, str(error))
            for later in chain[index + 1 :]:
                disk.set_aside(later, f"it builds on version {link.version}, which is damaged")
            return chain[:index]
    return chain
