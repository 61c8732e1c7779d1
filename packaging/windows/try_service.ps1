# Install silently on a Windows machine, see the service run, uninstall: try_service.ps1 INSTALLER (administrators only).
param([Parameter(Mandatory)] [string] $Installer)
$ErrorActionPreference = "Stop"
$installed = "$env:ProgramFiles\Medplum Agent"

function Run([string] $Program, [string[]] $Arguments) {
    $process = Start-Process $Program $Arguments -Wait -PassThru
    if ($process.ExitCode -ne 0) { throw "$Program ended with $($process.ExitCode)" }
}

Run $Installer "/S", "/BASE_URL=http://127.0.0.1:9/", "/CLIENT_ID=c1", "/CLIENT_SECRET=s1", "/AGENT_ID=a1"
(Get-Service MedplumAgent).WaitForStatus("Running", "00:00:30")
foreach ($try in 1..30) { # it has got so far that it writes its log
    if (Get-ChildItem "$env:ProgramData\MedplumAgent" -Recurse -Filter "medplum-agent-main-*") { break }
    if ($try -eq 30) { throw "the agent writes no log" }
    Start-Sleep 1
}
$readers = (Get-Acl "$installed\agent.properties").Access.IdentityReference.Value -join " "
if ($readers -match "Users|Everyone") { throw "others can read the secret: $readers" }

Run "$installed\uninstall.exe" "/S", "/PURGE"
foreach ($try in 1..30) {
    if (-not (Test-Path $installed)) { break }
    if ($try -eq 30) { throw "$installed is still there" }
    Start-Sleep 1
}
if (Get-Service MedplumAgent* -ErrorAction SilentlyContinue) { throw "the service is still there" }
"all as it should be"
