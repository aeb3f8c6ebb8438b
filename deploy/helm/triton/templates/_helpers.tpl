{{/*
A Service's name has no dots and begins with a letter; a release's may have them, and begin with a digit.
*/}}
{{- define "triton.fullname" -}}
{{- $release := .Release.Name | replace "." "-" }}
{{- $full := "" }}
{{- if .Values.fullnameOverride }}{{ $full = .Values.fullnameOverride }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name $release }}{{ $full = $release }}{{ else }}{{ $full = printf "%s-%s" $release $name }}{{ end }}
{{- end }}
{{- $full = $full | trunc 40 | trimSuffix "-" }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) }}
{{- fail (printf "%q cannot be the name of a Service: set fullnameOverride to small letters, digits and dashes, a letter first" $full) }}
{{- end }}
{{- $full }}
{{- end }}

{{- define "triton.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "triton.labels" -}}
{{ include "triton.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "triton.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "triton.fullname" .) .Values.serviceAccount.name }}
{{- else }}{{ default "default" .Values.serviceAccount.name }}{{ end }}
{{- end }}

{{- define "triton.imageOf" -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}
{{- else }}
{{- if eq (toString .tag) "latest" }}{{ fail "image.tag is latest, which changes under running pods: name a release, for instance 26.07-py3" }}{{ end }}
{{- .repository }}:{{ required "image.tag or image.digest is required: a release of Triton, not latest" .tag }}
{{- end }}
{{- end }}

{{- define "triton.image" -}}
{{- include "triton.imageOf" .Values.image }}
{{- end }}

{{/*
A kind's own settings over the common values, as JSON {image, resources, affinity, runtimeClassName, autoscaling,
rollout, podDisruptionBudget}. Arguments: (list $ kind).
*/}}
{{- define "triton.kindValues" -}}
{{- $root := index . 0 }}{{- $kind := index . 1 }}
{{- $image := deepCopy $root.Values.image }}
{{- with $kind.image }}
{{- if and .tag (not .digest) }}{{- $_ := set $image "digest" "" }}{{ end }}
{{- $image = mergeOverwrite $image (deepCopy .) }}
{{- end }}
{{- $own := dict "image" (include "triton.imageOf" $image) "pullPolicy" $image.pullPolicy }}
{{- $_ := set $own "resources" (mergeOverwrite (deepCopy $root.Values.resources) (deepCopy (default dict $kind.resources))) }}
{{- $_ := set $own "affinity" (default $root.Values.affinity $kind.affinity) }}
{{- $_ := set $own "runtimeClassName" (default $root.Values.runtimeClassName $kind.runtimeClassName) }}
{{- range $name := list "autoscaling" "rollout" "podDisruptionBudget" }}
{{- $_ := set $own $name (mergeOverwrite (deepCopy (get $root.Values $name)) (deepCopy (default dict (get $kind $name)))) }}
{{- end }}
{{- toJson $own }}
{{- end }}

{{- define "triton.isObjectStore" -}}
{{- if regexMatch "^(s3|gs|as)://" .Values.repository.url }}true{{ end }}
{{- end }}

{{/*
Refuse a wrong number of pods or GPUs. A schema would say "got string, want integer" of `--set replicas=2.5`.
Arguments: (list name value lowest).
*/}}
{{- define "triton.checkWhole" -}}
{{- $text := toString (index . 1) }}
{{- if or (not (regexMatch "^[0-9]+$" $text)) (lt (int $text) (index . 2)) }}
{{- fail (printf "%s is %s: expected a whole number, %d or more" (index . 0) $text (index . 2)) }}
{{- end }}
{{- end }}

{{/*
Checks of the values beyond the schema, or with a clearer message.
*/}}
{{- define "triton.check" -}}
{{- include "triton.checkWhole" (list "replicas" .Values.replicas 0) }}
{{- $seen := dict }}
{{- range $kind := .Values.kinds }}
{{- $name := default "any" $kind.name }}
{{- if hasKey $seen $name }}{{ fail (printf "kinds: two of them are named %q; each needs a name of its own" $name) }}{{ end }}
{{- $_ := set $seen $name true }}
{{- $own := include "triton.kindValues" (list $ $kind) | fromJson }}
{{- $rollout := $own.rollout }}
{{- if not (kindIs "invalid" $kind.replicas) }}{{ include "triton.checkWhole" (list (printf "kinds %q: replicas" $name) $kind.replicas 0) }}{{ end }}
{{- include "triton.checkWhole" (list (printf "kinds %q: gpus" $name) (default 0 $kind.gpus) 0) }}
{{- range $bound := list "minReplicas" "maxReplicas" }}
{{- include "triton.checkWhole" (list (printf "kinds %q: autoscaling.%s" $name $bound) (get $own.autoscaling $bound) 1) }}
{{- end }}
{{- if and $own.autoscaling.enabled (lt (int $own.autoscaling.maxReplicas) (int $own.autoscaling.minReplicas)) }}
{{- fail (printf "kinds %q: autoscaling.maxReplicas (%v) is below autoscaling.minReplicas (%v)" $name $own.autoscaling.maxReplicas $own.autoscaling.minReplicas) }}
{{- end }}
{{- if and $own.autoscaling.enabled (eq $own.autoscaling.by "keda") (not $own.autoscaling.prometheus) }}
{{- fail (printf "kinds %q: autoscaling.prometheus is required with autoscaling.by keda: the address that KEDA asks" $name) }}
{{- end }}
{{- $live := lookup "apps/v1" "Deployment" $.Release.Namespace (include "triton.kindName" (list $ $kind)) }}
{{- $chosen := merge (dict "repo-manager/kind" $name) (include "triton.selector" $ | fromYaml) }}
{{- $had := dig "spec" "selector" "matchLabels" dict $live }}
{{- if and $had (ne (toJson $had) (toJson $chosen)) }}
{{- fail (printf "Deployment %s selects its pods by %s, and Kubernetes does not let that be changed to %s: keep nameOverride, or set another fullnameOverride" $live.metadata.name (toJson $had) (toJson $chosen)) }}
{{- end }}
{{- if and (eq (toString $rollout.maxSurge | trimSuffix "%") "0") (eq (toString $rollout.maxUnavailable | trimSuffix "%") "0") }}
{{- fail (printf "kinds %q: rollout.maxSurge and rollout.maxUnavailable are both 0, so no pod could ever be replaced" $name) }}
{{- end }}
{{- end }}
{{- if and .Values.repository.requireSnapshot (not .Values.repository.snapshot) }}
{{- fail "repository.snapshot is empty, and repository.requireSnapshot is true: pin one with `repo-manager snapshot --values FILE`, and give helm that file" }}
{{- end }}
{{- if .Values.warmStart.enabled }}
{{- if not .Values.warmStart.image }}{{ fail "warmStart.image is required with warmStart.enabled: repo-manager's image, with its tag or digest" }}{{ end }}
{{- if hasSuffix ":latest" .Values.warmStart.image }}{{ fail "warmStart.image is latest, which changes under running pods: name a version" }}{{ end }}
{{- if and .Values.warmStart.signedBy.configMap (not .Values.warmStart.signedBy.keys) }}
{{- fail "warmStart.signedBy.keys is empty: name the entries of the ConfigMap that hold public keys" }}
{{- end }}
{{- range $kind := .Values.kinds }}
{{- if not (include "triton.served" (list $ (include "triton.kindName" (list $ $kind))) | fromJson).isPinned }}
{{- fail "warmStart keeps snapshots, and none is pinned: `repo-manager snapshot --values FILE` writes one; give helm that file" }}
{{- end }}
{{- end }}
{{- end }}
{{- $own := list "MODEL_REPOSITORY" "HOME" }}
{{- if .Values.warmStart.enabled }}{{ $own = append $own "TMPDIR" }}{{ end }}
{{- if .Values.repository.s3.region }}{{ $own = append $own "AWS_DEFAULT_REGION" }}{{ end }}
{{- if .Values.repository.s3.secretName }}{{ $own = concat $own (list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY") }}{{ end }}
{{- range $entry := .Values.extraEnv }}
{{- if has $entry.name $own }}{{ fail (printf "extraEnv: %s is set by the chart; use the value that is meant for it" $entry.name) }}{{ end }}
{{- end }}
{{- if hasPrefix "/" .Values.repository.url }}
{{- $mount := printf "%s/" (.Values.repository.volume.mountPath | trimSuffix "/") }}
{{- range $place := list .Values.repository.url (include "triton.snapshots" .) }}
{{- if not (hasPrefix $mount $place) }}
{{- fail (printf "repository: %s is not below volume.mountPath (%s); keep the repository in a folder of the volume, for instance %srepository, so that its snapshots lie beside it in the volume" $place $mount $mount) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/*
The environment variables for reading the repository, its place among them. Argument: the root.
*/}}
{{- define "triton.storageEnv" -}}
{{- with .Values.repository.s3.region }}
- name: AWS_DEFAULT_REGION
  value: {{ . | quote }}
{{- end }}
{{- with .Values.repository.s3.secretName }}
{{- range $key := list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ $key }}
  valueFrom:
    secretKeyRef:
      name: {{ $.Values.repository.s3.secretName }}
      key: {{ $key }}
{{- end }}
{{- end }}
{{- end }}

{{- define "triton.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/*
The sidecar of warmStart: Kubernetes starts Triton when its startup probe has passed. Arguments: (list $ served).
*/}}
{{- define "triton.warmStart" -}}
{{- $root := index . 0 }}{{- $warm := $root.Values.warmStart -}}
- name: snapshot
  image: {{ $warm.image | quote }}
  imagePullPolicy: IfNotPresent
  restartPolicy: Always
  command: [repo-manager, fetch]
  args:
    - $(MODEL_REPOSITORY)
    - /warm
    - --link=/snapshot/models
    - --keep={{ $warm.keep }}
    - --hold
    {{- range $key := (ternary $warm.signedBy.keys list (ne $warm.signedBy.configMap "")) }}
    - --signed-by=/keys/{{ $key }}
    {{- end }}
  env:
    - name: MODEL_REPOSITORY
      value: {{ (index . 1).url | quote }}
    - name: HOME
      value: /tmp
    # Downloaded files are moved, not copied.
    - name: TMPDIR
      value: /warm
    {{- with include "triton.storageEnv" $root | trim }}{{ . | nindent 4 }}{{ end }}
    {{- with $root.Values.extraEnv }}{{ toYaml . | nindent 4 }}{{ end }}
  startupProbe:
    exec:
      command: [test, -e, /snapshot/models/snapshot.json]
    periodSeconds: 2
    failureThreshold: {{ mul $root.Values.probes.startupTries 5 }}
    timeoutSeconds: 2
  resources: {{ toYaml $warm.resources | nindent 4 }}
  securityContext: {{ include "triton.containerSecurity" $root | nindent 4 }}
  volumeMounts:
    - name: warm
      mountPath: /warm
    - name: snapshot
      mountPath: /snapshot
    - name: scratch
      mountPath: /tmp
    {{- if $warm.signedBy.configMap }}
    - name: keys
      mountPath: /keys
      readOnly: true
    {{- end }}
    {{- if $root.Values.repository.volume.source }}
    - name: models
      mountPath: {{ $root.Values.repository.volume.mountPath }}
      readOnly: true
    {{- end }}
{{- end }}

{{- define "triton.snapshots" -}}
{{- default (printf "%s.snapshots" (.Values.repository.url | trimSuffix "/")) .Values.repository.snapshots }}
{{- end }}

{{/*
One kind's name, with the release's. Arguments: (list $ kind).
*/}}
{{- define "triton.kindName" -}}
{{- $root := index . 0 }}{{- $kind := index . 1 }}
{{- if $kind.name }}{{ printf "%s-%s" (include "triton.fullname" $root) $kind.name }}{{ else }}{{ include "triton.fullname" $root }}{{ end }}
{{- end }}

{{/*
The served state, as JSON {url, replicas, isPinned}: the pinned snapshot, else the one repo-manager has rolled out of this
repository (an upgrade must not undo a roll-out, and another repository.url must not be ignored), else the repository.
`replicas` is the number of running pods, 0 for none. `isPinned` is false where pods load the repository itself. Arguments: (list $ deploymentName).
*/}}
{{- define "triton.served" -}}
{{- $root := index . 0 }}
{{- $url := $root.Values.repository.url }}
{{- $live := lookup "apps/v1" "Deployment" $root.Release.Namespace (index . 1) }}
{{- if $root.Values.repository.snapshot }}
{{- $url = $root.Values.repository.snapshot }}
{{- else }}
{{- $pod := dig "spec" "template" "spec" dict $live }}
{{- $snapshot := "" }}
{{- range $container := concat (default list $pod.initContainers) (default list $pod.containers) }}
{{- range $entry := $container.env }}
{{- if eq $entry.name "MODEL_REPOSITORY" }}{{ $snapshot = default "" $entry.value }}{{ end }}
{{- end }}
{{- end }}
{{- if hasPrefix (printf "%s/" (include "triton.snapshots" $root | trimSuffix "/")) $snapshot }}
{{- $url = $snapshot }}
{{- end }}
{{- end }}
{{- dict "url" $url "replicas" (dig "spec" "replicas" 0 $live | int) "isPinned" (ne $url $root.Values.repository.url) | toJson }}
{{- end }}
