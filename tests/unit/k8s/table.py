"""The checks of test_overlays.py as a table: `python -m tests.unit.k8s.table`, which `make test-k8s` ends with.

A row for each overlay, a column for each source of checks: how many hold, or the names of those that do not.
"""

import sys

from tests.unit.k8s import cluster_policy, manifests, operator_rules, schemas, security_policy

COLUMNS = {
    "Kubernetes' schemas": schemas.CHECKS,
    "KubeRay's definitions, CEL": schemas.CUSTOM_CHECKS,
    "operators' rules": operator_rules.CHECKS,
    "security": security_policy.CHECKS,
    "pools, sizes, run": cluster_policy.CHECKS,
}


def main() -> int:
    """Print the table; 1 when a check fails."""
    rows = [["overlay", "objects", *COLUMNS]]
    has_failed = False
    for overlay in manifests.OVERLAYS:
        objects = manifests.build(manifests.K8S / "overlays" / overlay)
        row = [overlay, str(len(objects))]
        for checks in COLUMNS.values():
            if checks is schemas.CUSTOM_CHECKS and not schemas.DEFINITIONS.is_dir():
                row.append("not at hand")
                continue
            failed = [check.__name__ for check in checks if list(check(objects))]
            has_failed |= bool(failed)
            row.append(", ".join(failed) or f"{len(checks)} hold")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
