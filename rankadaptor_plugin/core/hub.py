"""What to do where a repository of the Hub cannot be had."""

from __future__ import annotations


def hub_problem(kind: str, name: str, error: BaseException, revision: str = "") -> str:
    """Returns one line: what is wrong with a model or dataset of the Hub, and what to do.

    Args:
        kind: ``model`` or ``dataset``.
        name: Such as ``owner/name``.
        error: Of the Hub's client, or with one among its causes.
        revision: Branch, tag or commit; empty for the main branch.
    """
    from huggingface_hub import errors

    chain = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    option = "" if kind == "model" else " --repo-type dataset"

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if among(errors.GatedRepoError) or "gated dataset" in str(error):
        return (
            f"The {kind} {name} on the Hub is gated. Accept its terms on its page, then log in "
            "with: hf auth login (or set HF_TOKEN)."
        )
    if among(errors.RevisionNotFoundError):
        return (
            f'The {kind} {name} on the Hub has no revision "{revision}". Set revision to a '
            "branch, tag or commit of it."
        )
    if among(errors.RepositoryNotFoundError):
        return (
            f"The {kind} {name} is neither on this machine nor on the Hub. Correct the name or "
            "path; if the repository is private, log in with: hf auth login (or set HF_TOKEN)."
        )
    if among(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError):
        return (
            f"The {kind} {name} is not on this machine, and the Hub cannot be reached. Correct the "
            f"path, or download it where there is a network: hf download {name}{option}"
        )
    reason = " ".join(str(error).split())[:200]
    return (
        f"The {kind} {name} cannot be downloaded ({type(error).__name__}: {reason}). Try again, or "
        f"download it with: hf download {name}{option}"
    )
