"""A local Ray that lives until its standard input says stop or closes: prints the address that jobs join."""

import sys

import ray

if __name__ == "__main__":
    context = ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    print(context.address_info["gcs_address"], flush=True)
    sys.stdin.readline()
    ray.shutdown()
