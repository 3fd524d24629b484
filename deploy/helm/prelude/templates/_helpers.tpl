{{- define "prelude.name" -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "prelude.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "prelude.labels" -}}
{{ include "prelude.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "prelude.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "prelude.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "prelude.name" .) }}
{{- else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- /* Contradictions end the rendering with a sentence instead of pods that never start. */ -}}
{{- define "prelude.check" -}}
{{- if and (not .Values.keys.secret) (not .Values.keys.allowAnonymous) }}
{{- fail "Set keys.secret to a secret with keys.json (prelude keys create), or keys.allowAnonymous=true to let in everybody who reaches the service." }}
{{- end }}
{{- if and .Values.keys.secret .Values.keys.allowAnonymous }}
{{- fail "Set either keys.secret or keys.allowAnonymous, not both." }}
{{- end }}
{{- if and (not .Values.store.bucket) (or .Values.autoscaling.enabled (gt (int .Values.replicas) 1)) }}
{{- fail "Several replicas need one store: set store.bucket to s3://BUCKET/PREFIX, gs://… or az://…, or keep replicas at 1 and autoscaling.enabled at false." }}
{{- end }}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) }}
{{- fail "autoscaling.minReplicas must not be larger than autoscaling.maxReplicas." }}
{{- end }}
{{- if and .Values.serviceMonitor.enabled .Values.keys.secret (not .Values.serviceMonitor.keySecret) }}
{{- fail "With API keys, set serviceMonitor.keySecret to a secret whose entry `key` is a key with the scope `metrics`." }}
{{- end }}
{{- end }}
