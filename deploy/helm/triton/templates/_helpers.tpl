{{- define "triton.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}
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

{{- define "triton.image" -}}
{{- if .Values.image.digest }}{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else }}{{ .Values.image.repository }}:{{ required "image.tag or image.digest is required: a release of Triton, not latest" .Values.image.tag }}{{ end }}
{{- end }}

{{- define "triton.isObjectStore" -}}
{{- if regexMatch "^(s3|gs|as)://" .Values.repository.url }}true{{ end }}
{{- end }}

{{/*
What no schema can say of the values.
*/}}
{{- define "triton.check" -}}
{{- $seen := dict }}
{{- range $kind := .Values.kinds }}
{{- $name := default "any" $kind.name }}
{{- if hasKey $seen $name }}{{ fail (printf "kinds: two of them are named %q; each needs a name of its own" $name) }}{{ end }}
{{- $_ := set $seen $name true }}
{{- $rollout := mergeOverwrite (deepCopy $.Values.rollout) (default dict $kind.rollout) }}
{{- if and (eq (toString $rollout.maxSurge | trimSuffix "%") "0") (eq (toString $rollout.maxUnavailable | trimSuffix "%") "0") }}
{{- fail (printf "kinds %q: rollout.maxSurge and rollout.maxUnavailable are both 0, so no pod could ever be replaced" $name) }}
{{- end }}
{{- end }}
{{- if and .Values.repository.requireSnapshot (not .Values.repository.snapshot) }}
{{- fail "repository.snapshot is empty, and repository.requireSnapshot is true: pin one with `repo-manager snapshot --values FILE`, and give helm that file" }}
{{- end }}
{{- $own := list "MODEL_REPOSITORY" "HOME" }}
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
What the pods serve, as JSON {url, models, replicas, isPinned}: the pinned snapshot, else what repo-manager has rolled out of this very
repository (an upgrade must not undo a roll-out, and another repository.url must not be ignored), else the repository.
`replicas` is what runs now, 0 when nothing does. `isPinned` is false where pods load the repository itself. Arguments: (list $ deploymentName).
*/}}
{{- define "triton.served" -}}
{{- $root := index . 0 }}
{{- $url := $root.Values.repository.url }}
{{- $models := "" }}
{{- $live := lookup "apps/v1" "Deployment" $root.Release.Namespace (index . 1) }}
{{- if $root.Values.repository.snapshot }}
{{- $url = $root.Values.repository.snapshot }}
{{- else }}
{{- $known := dig "spec" "template" "metadata" "annotations" dict $live }}
{{- $snapshot := default "" (get $known "repo-manager/snapshot") }}
{{- if hasPrefix (printf "%s/" (include "triton.snapshots" $root | trimSuffix "/")) $snapshot }}
{{- $url = $snapshot }}
{{- with get $known "repo-manager/models" }}{{ $models = . }}{{ end }}
{{- end }}
{{- end }}
{{- dict "url" $url "models" $models "replicas" (dig "spec" "replicas" 0 $live | int) "isPinned" (ne $url $root.Values.repository.url) | toJson }}
{{- end }}
