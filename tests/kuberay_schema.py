"""The fields of KubeRay's RayCluster, RayJob and RayService (ray.io/v1), as a JSON schema that knows no others.

KubeRay's own definitions are 700 kB and more each and lie on GitHub, where CI does not reach them. The names and types
here were read in its API reference, Go types and generated client (versions 1.4 to 1.6; newer fields are left out).
What Kubernetes defines (pod templates, Services) is checked against Kubernetes' own schemas, not here.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
OF_KUBERNETES: Schema = {"type": "object"}  # checked by kubernetes_validate
LIST_OF_KUBERNETES: Schema = {"type": "array", "items": OF_KUBERNETES}
MANAGER = {"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]}


def record(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


CREDENTIAL = record(value=TEXT, valueFrom=OF_KUBERNETES)

RAY_CLUSTER_SPEC = record(
    ("headGroupSpec",),
    suspend=FLAG,
    managedBy=MANAGER,
    rayVersion=TEXT,
    authOptions=record(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    upgradeStrategy=record(type={"enum": ["Recreate", "None"]}),
    enableInTreeAutoscaling=FLAG,
    headServiceAnnotations=TEXTS,
    autoscalerOptions=record(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources=OF_KUBERNETES,
        image=TEXT,
        imagePullPolicy=TEXT,
        env=LIST_OF_KUBERNETES,
        envFrom=LIST_OF_KUBERNETES,
        volumeMounts=LIST_OF_KUBERNETES,
        securityContext=OF_KUBERNETES,
    ),
    gcsFaultToleranceOptions=record(
        redisAddress=TEXT, redisUsername=CREDENTIAL, redisPassword=CREDENTIAL, externalStorageNamespace=TEXT
    ),
    headGroupSpec=record(
        ("template",),
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        headService=OF_KUBERNETES,
        enableIngress=FLAG,
        resources=TEXTS,
        labels=TEXTS,
        rayStartParams=TEXTS,
        template=OF_KUBERNETES,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": record(
            ("groupName", "minReplicas", "maxReplicas", "template"),
            suspend=FLAG,
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT,
            resources=TEXTS,
            labels=TEXTS,
            rayStartParams=TEXTS,
            scaleStrategy=record(workersToDelete={"type": "array", "items": TEXT}),
            template=OF_KUBERNETES,
        ),
    },
)

RAY_JOB_SPEC = record(
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    metadata=TEXTS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=OF_KUBERNETES,
    submitterConfig=record(backoffLimit=COUNT),
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    deletionStrategy=OF_KUBERNETES,
    suspend=FLAG,
    managedBy=MANAGER,
    clusterSelector=TEXTS,
    rayClusterSpec=RAY_CLUSTER_SPEC,
)

RAY_SERVICE_SPEC = record(
    ("rayClusterConfig",),
    serveConfigV2=TEXT,
    rayClusterConfig=RAY_CLUSTER_SPEC,
    serveService=OF_KUBERNETES,
    excludeHeadPodFromServeSvc=FLAG,
    rayClusterDeletionDelaySeconds=COUNT,
    upgradeStrategy=record(
        type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}, clusterUpgradeOptions=OF_KUBERNETES
    ),
    managedBy=MANAGER,
    suspend=FLAG,
)

SPECS = {"RayCluster": RAY_CLUSTER_SPEC, "RayJob": RAY_JOB_SPEC, "RayService": RAY_SERVICE_SPEC}


def manifest_schema(kind: str) -> Schema:
    """Of a whole manifest of one kind."""
    metadata = record(("name",), name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
    head = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}}
    return record(("apiVersion", "kind", "metadata", "spec"), **head, metadata=metadata, spec=SPECS[kind])
