# Install silently on a Windows machine, see the service run and stop, uninstall: try_service.ps1 INSTALLER [-Test]
# (administrators only). -Test: run the tests against what is installed and the one file beside the installer.
param([Parameter(Mandatory)] [string] $Installer, [switch] $Test)
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

if ($Test) {
    $env:MEDPLUM_AGENT_BINARY = "$installed\program\medplum-agent.exe"
    $env:MEDPLUM_AGENT_ONE_FILE = (Get-Item "$(Split-Path $Installer)\medplum-agent-*-windows-x86_64.exe").FullName
    python build.py test --binary
    if ($LASTEXITCODE -ne 0) { throw "the tests ended with $LASTEXITCODE" }
}

Stop-Service MedplumAgent
(Get-Service MedplumAgent).WaitForStatus("Stopped", "00:00:30")
if (Get-Process medplum-agent -ErrorAction SilentlyContinue) { throw "the agent outlived its service" }

Run "$installed\uninstall.exe" "/S", "/PURGE"
foreach ($try in 1..30) {
    if (-not (Test-Path $installed)) { break }
    if ($try -eq 30) { throw "$installed is still there" }
    Start-Sleep 1
}
if (Get-Service MedplumAgent* -ErrorAction SilentlyContinue) { throw "the service is still there" }
"all as it should be"
