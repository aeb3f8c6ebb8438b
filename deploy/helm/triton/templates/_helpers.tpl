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
What the pods serve, as JSON {url, models}: the pinned snapshot, else what repo-manager has rolled out (an upgrade must not
undo a roll-out), else the repository. Arguments: (list $ deploymentName).
*/}}
{{- define "triton.served" -}}
{{- $root := index . 0 }}
{{- $url := $root.Values.repository.url }}
{{- $models := "" }}
{{- if $root.Values.repository.snapshot }}
{{- $url = $root.Values.repository.snapshot }}
{{- else }}
{{- $live := lookup "apps/v1" "Deployment" $root.Release.Namespace (index . 1) }}
{{- $known := dig "spec" "template" "metadata" "annotations" dict $live }}
{{- with get $known "repo-manager/snapshot" }}{{ $url = . }}{{ end }}
{{- with get $known "repo-manager/models" }}{{ $models = . }}{{ end }}
{{- end }}
{{- dict "url" $url "models" $models | toJson }}
{{- end }}
