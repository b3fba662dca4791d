"""A whole subsystem in Python, made from the contract alone.

It averages what its inputs call `value`, over as many cycles as its parameter `window` says.
"""

import argparse
import collections
import concurrent.futures
import threading

import grpc

from dreamnet.subsystem.v1 import subsystem_pb2 as pb
from dreamnet.subsystem.v1 import subsystem_pb2_grpc as rpc


class Average(rpc.SubsystemServicer):
    def __init__(self):
        self.lock = threading.Lock()
        self.epoch = 0
        self.window = None  # The values of the latest cycles. None means: not initialized.
        self.last_cycle = None  # Its id, and what it was answered with.

    def Initialize(self, request, context):
        with self.lock:
            self.refuse_superseded(request.epoch, context)
            length = request.parameters["window"] if "window" in request.parameters else 10
            self.window = collections.deque(self.window or (), maxlen=int(length))
        return pb.InitializeResponse()

    def RunCycle(self, request, context):
        with self.lock:
            self.refuse_superseded(request.epoch, context)
            if self.window is None:
                # The orchestrator calls Initialize and then asks again.
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not initialized")
            if self.last_cycle is None or self.last_cycle[0] != request.cycle_id:
                self.last_cycle = request.cycle_id, self.average(request.inputs)
            # A call that is repeated is answered as the first one was.
            return self.last_cycle[1]

    def GetStatus(self, request, context):
        answer = pb.GetStatusResponse()
        with self.lock:
            answer.status.update({"values": list(self.window or ())})
        return answer

    def average(self, inputs):
        answer = pb.RunCycleResponse()
        for name, given in inputs.items():
            if given.freshness == pb.FRESHNESS_ABSENT or "value" not in given.output:
                answer.issues.add(severity=pb.SEVERITY_WARNING, code="NO_VALUE", message=f"{name} gave no value")
            else:
                self.window.append(given.output["value"])
        if self.window:
            answer.output.update({"average": sum(self.window) / len(self.window), "values": len(self.window)})
        answer.metrics["values"] = len(self.window)
        return answer

    def refuse_superseded(self, epoch, context):
        if epoch < self.epoch:
            context.abort(grpc.StatusCode.ABORTED, f"epoch {epoch} has been superseded by {self.epoch}")
        self.epoch = epoch


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", default="127.0.0.1:50051", help="address to listen on (default: %(default)s)")
    listen = parser.parse_args().listen

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=8))
    rpc.add_SubsystemServicer_to_server(Average(), server)
    port = server.add_insecure_port(listen)
    server.start()
    print(f"listening on {listen.rpartition(':')[0]}:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
