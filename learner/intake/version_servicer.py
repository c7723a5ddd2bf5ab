"""VersionService: decodes, calls, encodes."""

from learner.intake.refusals import RefusedError, mapped
from learner.intake.versions import Versions
from understudy.v1 import weight_pb2, weight_pb2_grpc

MAX_REPLICA_ID_BYTES = 64


class VersionServicer(weight_pb2_grpc.VersionServiceServicer):
    """Serves the intake's account of versions."""

    def __init__(self, versions: Versions) -> None:
        self.versions = versions

    async def IssueVersion(
        self, request: weight_pb2.IssueVersionRequest, context: object
    ) -> weight_pb2.IssueVersionResponse:
        with mapped():
            version = await self.versions.issue(request)
        return weight_pb2.IssueVersionResponse(version=version)

    async def AttachStore(
        self, request: weight_pb2.AttachStoreRequest, context: object
    ) -> weight_pb2.AttachStoreResponse:
        with mapped():
            await self.versions.attached(request.run_id, request.newest_version)
        return weight_pb2.AttachStoreResponse()

    async def ReportReplica(
        self, request: weight_pb2.ReportReplicaRequest, context: object
    ) -> weight_pb2.ReportReplicaResponse:
        with mapped():
            if len(request.replica_id.encode()) > MAX_REPLICA_ID_BYTES:
                raise RefusedError(
                    "BAD_REQUEST", f"replica_id is above {MAX_REPLICA_ID_BYTES} bytes"
                )
            self.versions.reported(request)
        return weight_pb2.ReportReplicaResponse()
